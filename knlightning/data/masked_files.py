"""A dataset of image files with a mask each, for semantic segmentation."""

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
from torchvision.transforms.v2 import functional as tv

from knlightning.checks import ArgumentError
from knlightning.data.decoding import decoded, opened
from knlightning.data.folder import abbreviated
from knlightning.data.image_files import AugmentedFiles
from knlightning.data.segmentation import IGNORED

UNKNOWN = (0, 0)
"""Size of an image that cannot be read."""


class MaskedFiles(AugmentedFiles):
    """Image files, each with a mask: a file of one 8-bit channel with a number for each pixel.

    Both are decoded when they are asked for, without regard to EXIF data. For evaluation they keep their size.

    When the object is made, the headers of all files are checked. The numbers in a mask are checked whenever it is
    decoded, and by `check_masks`.

    Args:
        images: Paths of the images.
        masks: Paths of their masks, in the same order.
        labels: Label, 0 to 255, of each number that a mask may have.
        augmentation: Augments an image and its labels for training.
        strata: int64 `(N,)`, the group of each image where a part is held out; None for one group.
        num_threads: Threads that check files.
        skip_damaged: Whether an image that cannot be read, or whose mask cannot, is skipped, see `AugmentedFiles`.

    Raises:
        ValueError: If a file cannot be read and is not skipped, if a mask has another size than its image, or if none
            of the images can be read; the message names it.
    """

    def __init__(
        self,
        images: Sequence[str | os.PathLike[str]],
        masks: Sequence[str | os.PathLike[str]],
        labels: Mapping[int, int],
        augmentation: Callable[[tv_tensors.Image, tv_tensors.Mask], tuple[Tensor, Tensor]],
        strata: Tensor | None = None,
        num_threads: int = 1,
        skip_damaged: bool = False,
    ) -> None:
        # One block of memory: forked processes would copy lists of strings as soon as they count references to them
        self.images, self.masks = (np.array([os.fsencode(path) for path in paths]) for paths in (images, masks))
        self._strata = torch.zeros(len(images), dtype=torch.int64) if strata is None else strata
        self.numbers = sorted(labels)
        self.label_of_number = np.full(256, IGNORED, np.uint8)
        self.label_of_number[self.numbers] = [labels[number] for number in self.numbers]
        self.augmentation = augmentation
        self.num_threads, self.skip_damaged = num_threads, skip_damaged
        self.forget_damaged()
        with ThreadPoolExecutor(num_threads) as pool:
            sizes = list(pool.map(lambda index: self.skipping(index, lambda: self._size(index)), range(len(images))))
        self.sizes = np.array([size or UNKNOWN for size in sizes])
        if len(sizes) and self.damaged.all():
            raise self.none_readable()

    @property
    def strata(self) -> Tensor:
        return self._strata

    def path_of(self, index: int) -> str:
        return os.fsdecode(self.images[index])

    def evaluation_sample(self, index: int) -> Any:
        """Return an image, uint8 `(3, H, W)`, and its labels, uint8 `(H, W)`; None if it is skipped."""
        return self.skipping(index, lambda: self._read(index))

    def training_sample(self, index: int) -> Any:
        return self.skipping(index, lambda: self._augmented(*self._read(index)))

    def empty_batch(self) -> tuple[Tensor, Tensor]:
        width, height = self.sizes.max(0)
        return torch.empty(0, 3, height, width, dtype=torch.uint8), torch.empty(0, height, width, dtype=torch.uint8)

    def take(self, indices: Tensor) -> Self:
        subset = copy.copy(self)
        subset._strata = self._strata[indices]
        for name in ("images", "masks", "sizes"):
            setattr(subset, name, getattr(self, name)[indices.numpy()])
        subset.forget_damaged(self.damaged[indices])
        return subset

    def check_masks(self, indices: Sequence[int]) -> None:
        """Decode masks, and check that all their numbers have a label.

        Args:
            indices: Indices of the masks.

        Raises:
            ValueError: If a mask is damaged and not skipped, or has a number without a label; the message names it.
        """

        def check_mask(index: int) -> None:
            self.skipping(index, lambda: self._mask(index))  # not returned: pool.map keeps what is returned

        with ThreadPoolExecutor(self.num_threads) as pool:
            for _ in pool.map(check_mask, indices):
                pass

    def check_eval_batch_size(self, batch_size: int) -> None:
        known = (self.sizes != UNKNOWN).any(1).nonzero()[0]
        other = known[(self.sizes[known] != self.sizes[known[:1]]).any(1)]
        if batch_size > 1 and len(other):
            first, second = (f"{self.path_of(n)} ({_by(self.sizes[n])})" for n in (known[0], other[0]))
            raise ArgumentError(
                "eval_batch_size", batch_size, "1 where images differ in size", f"There are {first} and {second}."
            )

    def _size(self, index: int) -> tuple[int, int]:
        """Return the width and height of an image, which are those of its mask too."""
        path, mask = self.path_of(index), os.fsdecode(self.masks[index])
        with opened(path) as image:
            size = image.size
        with opened(mask) as image:
            mask_size, mode = image.size, image.mode
        if mode not in ("L", "P"):
            raise ValueError(f"{mask}: must have one channel of 8 bits, with a number for each pixel; is {mode}.")
        if mask_size != size:
            raise ValueError(f"{mask}: has {_by(mask_size)} pixels, and its image {path} {_by(size)}.")
        return size

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        image = tv.pil_to_tensor(decoded(self.path_of(index), upright=False))
        return image, torch.from_numpy(self.label_of_number[np.asarray(self._mask(index))])

    def _augmented(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        image, labels = self.augmentation(tv_tensors.Image(image), tv_tensors.Mask(labels))
        return image.as_subclass(Tensor), labels.as_subclass(Tensor)

    def _mask(self, index: int) -> Image.Image:
        path = os.fsdecode(self.masks[index])
        with opened(path) as mask:
            counts = mask.histogram()  # numbers of a palette's colours too
        unknown = {number: count for number, count in enumerate(counts) if count and number not in self.numbers}
        if unknown:
            raise ValueError(
                f"{path}: {sum(unknown.values())} pixels have numbers without a label: "
                f"{abbreviated([str(number) for number in unknown])}. Numbers with a label are {_ranges(self.numbers)}."
            )
        return mask


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
