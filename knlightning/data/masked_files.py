"""Images with a mask each, for semantic segmentation: a dataset, and the base of datamodules."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from knlightning.checks import ArgumentError, check, check_number
from knlightning.data.base import Scaling
from knlightning.data.decoding import decoded, opened
from knlightning.data.folder import abbreviated
from knlightning.data.image_files import AugmentedFiles, EncodedImages, FilePaths
from knlightning.data.labelled_files import IMAGENET_MEAN, IMAGENET_STD
from knlightning.data.mask_transforms import PadRightBottom, RandomScale
from knlightning.data.samplers import Sampling
from knlightning.data.segmentation import IGNORED, SegmentationDataModule

UNKNOWN = (0, 0)
"""Size of an image that cannot be read."""


class MaskedFiles(AugmentedFiles):
    """Images, each with a mask: an image of one 8-bit channel with a number for each pixel.

    Both are decoded when they are asked for, without regard to EXIF data. For evaluation they keep their size.

    When the object is made, the headers of all files are checked. The numbers in a mask are checked whenever it is
    decoded, and by `check_masks`.

    Args:
        images: Paths of the images, or the images themselves.
        masks: Those of their masks, in the same order.
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
        images: Sequence[str | os.PathLike[str]] | EncodedImages,
        masks: Sequence[str | os.PathLike[str]] | EncodedImages,
        labels: Mapping[int, int],
        augmentation: Callable[[tv_tensors.Image, tv_tensors.Mask], tuple[Tensor, Tensor]],
        strata: Tensor | None = None,
        num_threads: int = 1,
        skip_damaged: bool = False,
    ) -> None:
        self.images, self.masks = (
            each if isinstance(each, EncodedImages) else FilePaths(each) for each in (images, masks)
        )
        self.places = np.arange(len(images))
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

    def evaluation_sample(self, index: int) -> Any:
        """Return an image, uint8 `(3, H, W)`, and its labels, uint8 `(H, W)`; None if it is skipped."""
        return self.skipping(index, lambda: self._read(index))

    def training_sample(self, index: int) -> Any:
        return self.skipping(index, lambda: self._augmented(*self._read(index)))

    def empty_batch(self) -> tuple[Tensor, Tensor]:
        width, height = self.sizes.max(0)
        return torch.empty(0, 3, height, width, dtype=torch.uint8), torch.empty(0, height, width, dtype=torch.uint8)

    def take(self, indices: Tensor) -> Self:
        subset = super().take(indices)
        subset._strata, subset.sizes = self._strata[indices], self.sizes[indices.numpy()]
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
        place = int(self.places[index])
        path, mask = self.images.path_of(place), self.masks.path_of(place)
        with opened(*self.images.find(place)) as image:
            size = image.size
        with opened(*self.masks.find(place)) as image:
            mask_size, mode = image.size, image.mode
        if mode not in ("L", "P"):
            raise ValueError(f"{mask}: must have one channel of 8 bits, with a number for each pixel; is {mode}.")
        if mask_size != size:
            raise ValueError(f"{mask}: has {_by(mask_size)} pixels, and its image {path} {_by(size)}.")
        return size

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        path, content = self.images.find(int(self.places[index]))
        image = tv.pil_to_tensor(decoded(path, upright=False, content=content))
        return image, torch.from_numpy(self.label_of_number[np.asarray(self._mask(index))])

    def _augmented(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        image, labels = self.augmentation(tv_tensors.Image(image), tv_tensors.Mask(labels))
        return image.as_subclass(Tensor), labels.as_subclass(Tensor)

    def _mask(self, index: int) -> Image.Image:
        path, content = self.masks.find(int(self.places[index]))
        with opened(path, content) as mask:
            counts = mask.histogram()  # numbers of a palette's colours too
        unknown = {number: count for number, count in enumerate(counts) if count and number not in self.numbers}
        if unknown:
            raise ValueError(
                f"{path}: {sum(unknown.values())} pixels have numbers without a label: "
                f"{abbreviated([str(number) for number in unknown])}. Numbers with a label are {_ranges(self.numbers)}."
            )
        return mask


class MaskedFilesDataModule(SegmentationDataModule):
    """Base of the datamodules for images with a mask each, which are decoded while they are trained on.

    A training image is scaled by a random factor, padded on the right and at the bottom with black pixels that do not
    count where it is smaller than the crop, cropped at random, and mirrored with probability 1/2. How an image is
    augmented is a function of the run's seed, the epoch and the image alone, so that runs are equal with any number of
    processes, and when resumed. An epoch's last batch is left out if it is not full. Evaluation is on whole images.

    Before a stage begins, a mask of the same size is looked for beside every image, and masks are checked for numbers
    without a label. The latter decodes them all; it takes about 11 s of one core for 1000 files of 2048x1024, shared
    among threads and the processes that train together.

    A subclass overrides `load`, which returns what `masked` makes.

    Args:
        crop_size: `(height, width)` of training images.
        scale_range: Least and largest factor by which training images are scaled.
        scale_step: Distance between the factors that are drawn from; None for any factor in the range.
        check_labels: Whether masks are checked for numbers without a label before a stage begins; if not, a mask that
            has some is an error when it is read.
        skip_damaged: Whether an image that cannot be read, or whose mask cannot, is skipped, and counted in a warning
            at the end of an epoch; in training, the next one takes its place, but in private training none does. If
            not, it is an error.
        batch_size: Training images in a batch, on each device.
        eval_batch_size: The same for validation and test; None for `batch_size`. Above 1 images must have one size.
            Predictions are made one image at a time.
        scaling: `unit` divides pixels by 255; `standard` then subtracts ImageNet's mean and divides by its standard
            deviation.
        kwargs: Arguments of `BaseDataModule`.

    Raises:
        ArgumentError: If an argument is out of range.
    """

    mean = IMAGENET_MEAN
    std = IMAGENET_STD
    sampling = Sampling(drop_last=True)

    def __init__(
        self,
        *,
        crop_size: tuple[int, int] = (512, 1024),
        scale_range: tuple[float, float] = (0.5, 2.1),
        scale_step: float | None = 0.1,
        check_labels: bool = True,
        skip_damaged: bool = False,
        batch_size: int = 8,
        eval_batch_size: int | None = 1,
        scaling: Scaling = "standard",
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, scaling=scaling, **kwargs)
        sizes_ok = len(crop_size) == 2 and min(crop_size) >= 1
        check(sizes_ok, "crop_size", crop_size, "a height and a width of at least 1")
        low, high = scale_range
        check(0 < low <= high < float("inf"), "scale_range", scale_range, "two factors above 0, the smaller one first")
        check_number("scale_step", scale_step, above=0, none="any factor in scale_range")
        self.check_labels, self.skip_damaged = check_labels, skip_damaged
        self.augmentation = v2.Compose(
            [
                RandomScale(low, high, scale_step),
                PadRightBottom(crop_size),
                v2.RandomCrop(crop_size),
                v2.RandomHorizontalFlip(),
            ]
        )

    def masked(
        self,
        images: Sequence[str | os.PathLike[str]] | EncodedImages,
        masks: Sequence[str | os.PathLike[str]] | EncodedImages,
        labels: Mapping[int, int],
        where: str | os.PathLike[str],
        strata: Tensor | None = None,
    ) -> MaskedFiles:
        """Make the dataset of a split, and check its masks if `check_labels` says so.

        Args:
            images: Paths of the images, or the images themselves.
            masks: Those of their masks, in the same order.
            labels: Label, 0 to 255, of each number that a mask may have.
            where: Where the masks lie, for a message.
            strata: int64 `(N,)`, the group of each image where a part is held out; None for one group.

        Raises:
            ValueError: If `MaskedFiles` or its `check_masks` raise it.
        """
        readers = max(1, self._num_readers())
        files = MaskedFiles(images, masks, labels, self.augmentation, strata, readers, self.skip_damaged)
        if self.check_labels:
            rank_zero_info(f"Checking the labels of {len(files)} images in {where} (check_labels).")
            ranks, rank = self._ranks()
            files.check_masks(range(rank, len(files), ranks))
        return files


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
