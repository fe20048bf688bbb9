"""What the datamodules for semantic segmentation share: image and mask files, and transforms of both at once."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from knlightning.data.base import BaseDataModule, LabelledImages
from knlightning.data.folder import decoded, listed, opened
from knlightning.data.samplers import Draw

IGNORED = 255
"""Label of the pixels that count neither in the loss nor in the metrics."""


class SegmentationDataModule(BaseDataModule):
    """Base of the datamodules whose images have a label for each pixel.

    As they reach the task, batches for training and evaluation are `(images, labels)`, float `(N, C, H, W)` and int64
    `(N, H, W)`, where labels are 0 to `num_classes - 1`, or 255 for pixels that do not count. On their way to the
    device labels are uint8. Batches for prediction are `(images, paths)` of one image each, at its own size.

    Arguments are those of `BaseDataModule`.

    Attributes:
        palette: Colour of each class, red, green and blue of 0 to 255.
        label_ids: Number that stands for each class in files of labels.
        ignore_index: Label of the pixels that do not count, 255.
    """

    palette: tuple[tuple[int, int, int], ...]
    label_ids: tuple[int, ...]
    ignore_index = IGNORED

    _whole = True

    def on_after_batch_transfer(self, batch: tuple[Tensor, Any], dataloader_idx: int) -> tuple[Tensor, Any]:
        """Prepare the images of a batch that has arrived on its device, and make its labels int64.

        Args:
            batch: uint8 images `(N, C, H, W)`, and uint8 labels `(N, H, W)` or paths.
            dataloader_idx: Unused; Lightning gives it.

        Returns:
            Float images, in the trainer's precision, and int64 labels or the paths.
        """
        images, rest = super().on_after_batch_transfer(batch, dataloader_idx)
        return images, rest.long() if isinstance(rest, Tensor) else rest


class MaskedFiles(LabelledImages):
    """Image files, each with a mask: a file of one 8-bit channel that has a number for each pixel.

    Both are decoded when they are asked for, as they lie in the files, without regard to EXIF data. What is asked for
    by number stays whole. What is asked for by a `Draw` is varied, with random numbers that are a function of the draw
    alone (`Draw.random`).

    When the object is made, the heads of all files are looked at. The numbers in the masks are looked at whenever one
    is decoded, and by `check_masks`.

    Args:
        images: Paths of the images.
        masks: Paths of their masks, in the same order.
        strata: int64 `(N,)`, the group each image belongs to where a part is held out.
        classes: Label, 0 to 255, of each number that a mask may have.
        augmentation: Varies an image and its labels.
        threads: How many threads look at files.

    Raises:
        ValueError: A file is none that can be read, or a mask has another size than its image; the message names it.
    """

    def __init__(
        self,
        images: Sequence[str],
        masks: Sequence[str],
        strata: Tensor,
        classes: Mapping[int, int],
        augmentation: Callable[[tv_tensors.Image, tv_tensors.Mask], tuple[Tensor, Tensor]],
        threads: int,
    ) -> None:
        # One block of memory: processes that are forked would copy lists of strings by counting references to them
        self.images, self.masks = (np.array([os.fsencode(path) for path in paths]) for paths in (images, masks))
        self._strata = strata
        self.known = sorted(classes)
        self.table = np.full(256, IGNORED, np.uint8)
        self.table[self.known] = [classes[number] for number in self.known]
        self.augmentation = augmentation
        self.threads = threads
        with ThreadPoolExecutor(threads) as pool:
            self.sizes = np.array(list(pool.map(self._size, range(len(images)))))

    @property
    def strata(self) -> Tensor:
        return self._strata

    def __getitem__(self, item: int | Draw) -> tuple[Tensor, Tensor]:
        """Return an image, uint8 `(3, H, W)`, and its labels, uint8 `(H, W)`."""
        index = item.image if isinstance(item, Draw) else item
        image = tv.pil_to_tensor(decoded(os.fsdecode(self.images[index]), upright=False))
        labels = torch.from_numpy(self.table[np.asarray(self._mask(index))])
        if not isinstance(item, Draw):
            return image, labels
        with item.random():
            image, labels = self.augmentation(tv_tensors.Image(image), tv_tensors.Mask(labels))
        return image.as_subclass(Tensor), labels.as_subclass(Tensor)

    def take(self, rows: Tensor) -> Self:
        part = copy.copy(self)
        part._strata = self._strata[rows]
        for name in ("images", "masks", "sizes"):
            setattr(part, name, getattr(self, name)[rows.numpy()])
        return part

    @staticmethod
    def collate(samples: Any) -> tuple[Tensor, Tensor]:
        images, labels = zip(*samples, strict=True)
        return torch.stack(images), torch.stack(labels)

    def check_masks(self, indices: Sequence[int]) -> None:
        """Decode masks, and look whether all their numbers are known.

        Args:
            indices: Which masks.

        Raises:
            ValueError: A mask is damaged or has a number that is not known; the message names it.
        """
        with ThreadPoolExecutor(self.threads) as pool:
            for _ in pool.map(self._mask_read, indices):
                pass

    def check_one_size(self, argument: str) -> None:
        """Look whether all images have the same size, so that they can share a batch.

        Args:
            argument: What the size of the batches was set by, for the message.

        Raises:
            ValueError: They do not; the message names two that differ.
        """
        other = (self.sizes != self.sizes[0]).any(1).nonzero()[0]
        if len(other):
            named = (f"{os.fsdecode(self.images[n])} ({_by(self.sizes[n])})" for n in (0, other[0]))
            raise ValueError(
                f"{argument}: images that share a batch must have one size; there are {' and '.join(named)}. Give 1."
            )

    def _size(self, index: int) -> tuple[int, int]:
        """Return the width and height of an image, which its mask shares."""
        path, mask = (os.fsdecode(paths[index]) for paths in (self.images, self.masks))
        with opened(path) as image:
            size = image.size
        with opened(mask) as image:
            mask_size, mode = image.size, image.mode
        if mode not in ("L", "P"):
            raise ValueError(f"{mask}: must have one channel of 8 bits, with a number for each pixel; is {mode}.")
        if mask_size != size:
            raise ValueError(f"{mask}: has {_by(mask_size)} pixels, and its image {path} {_by(size)}.")
        return size

    def _mask(self, index: int) -> Image.Image:
        path = os.fsdecode(self.masks[index])
        with opened(path) as mask:
            counts = mask.histogram()  # numbers of a palette's colours too
        unknown = {number: count for number, count in enumerate(counts) if count and number not in self.known}
        if unknown:
            raise ValueError(
                f"{path}: {sum(unknown.values())} pixels have numbers that are no label's: "
                f"{listed([str(number) for number in unknown])}. There are {_ranges(self.known)}."
            )
        return mask

    def _mask_read(self, index: int) -> None:
        self._mask(index)  # and let go of it: pool.map keeps what it returns


def _by(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


def _ranges(numbers: Sequence[int]) -> str:
    """Write sorted numbers as ranges."""
    ends: list[list[int]] = []
    for number in numbers:
        if ends and number == ends[-1][1] + 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in ends)


class RandomScale(v2.Transform):
    """Scale an image, and its mask alike, by a factor drawn at random.

    Images are interpolated bilinearly, without a filter against aliasing; masks take the nearest pixel.

    Args:
        low: Least factor, above 0.
        high: Largest factor, `low` or more.
        step: Distance between the factors, which are `low`, `low + step`, ... up to `high`, each as likely; None for
            any factor in between.
    """

    def __init__(self, low: float, high: float, step: float | None) -> None:
        super().__init__()
        self.low, self.high, self.step = low, high, step

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the size to scale to."""
        if self.step is None:
            factor = self.low + (self.high - self.low) * float(torch.rand(()))
        else:
            steps = int((self.high - self.low) / self.step + 1e-6)  # 1.6 / 0.1 may come out below 16
            factor = self.low + self.step * int(torch.randint(steps + 1, ()))
        height, width = tv.get_size(flat_inputs[0])
        return {"size": [max(1, round(height * factor)), max(1, round(width * factor))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Scale an image or a mask."""
        return tv.resize(inpt, params["size"], v2.InterpolationMode.BILINEAR, antialias=False)


class PadRightBottom(v2.Transform):
    """Extend an image, and its mask alike, to the right and downwards where it is too small.

    The image is extended by 0, black, and the mask by 255, which does not count.

    Args:
        size: `(height, width)` it has at least afterwards.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Extend an image or a mask."""
        height, width = tv.get_size(inpt)
        right, bottom = max(0, self.size[1] - width), max(0, self.size[0] - height)
        return tv.pad(inpt, [0, 0, right, bottom], fill=IGNORED if isinstance(inpt, tv_tensors.Mask) else 0)
