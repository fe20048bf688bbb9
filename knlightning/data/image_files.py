"""Datasets of labelled image files, decoded when they are asked for."""

import copy
import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from knlightning.data.datasets import AugmentedImages
from knlightning.data.decoding import UnreadableImageError, decoded, pixels, unreadable
from knlightning.data.folder import warn_of_damaged
from knlightning.data.samplers import SeededIndex
from knlightning.protocols import batch_independent


class AugmentedFiles(AugmentedImages):
    """Images in files. A file that cannot be read may be skipped.

    A subclass has the attribute `skip_damaged`, calls `forget_damaged` when it is made, and reads its files within
    `skipping`.

    Attributes:
        skip_damaged: Whether a file that cannot be read, or for which the memory does not suffice, is skipped. If not,
            it is an error. If so, training gets the next image in the list that can be read, with the label of that
            one, unless the index says that no other may take its place. Then, and in evaluation, None comes.
        damaged: bool `(N,)`, which files could not be read so far; shared by all processes that read.
    """

    skip_damaged: bool
    damaged: Tensor
    _reported: int

    @abstractmethod
    def path_of(self, index: int) -> str:
        """Return the path of an image."""

    @staticmethod
    @batch_independent()
    def collate(samples: Any) -> tuple[Tensor, Tensor]:
        read = [sample for sample in samples if sample is not None]
        return AugmentedImages.collate(read) if read else (torch.empty(0), torch.empty(0))

    def __getitem__(self, index: int | SeededIndex) -> Any:
        sample = super().__getitem__(index)
        if sample is not None or not isinstance(index, SeededIndex) or not index.replaceable:
            return sample
        for place in range(index.image + 1, index.image + len(self)):
            with index.random_numbers():  # its own: the other image may be shown in the same epoch
                sample = self.training_sample(place % len(self))
            if sample is not None:
                return sample
        raise self.none_readable()

    def report(self) -> None:
        """Warn of damaged files, if more were met since the last report."""
        self._reported = warn_of_damaged(
            self.damaged,
            self._reported,
            self.path_of,
            "could not be read so far, and were left out (others take their places in training, unless it is private)",
        )

    def forget_damaged(self, known: Tensor | None = None) -> None:
        """Begin a record of its own of what is damaged.

        Args:
            known: bool `(N,)`, which images are known to be; None for none of them.
        """
        self._reported = 0
        self.damaged = (torch.zeros(len(self), dtype=torch.bool) if known is None else known).share_memory_()

    def none_readable(self) -> ValueError:
        """Make the error for images none of which can be read."""
        return ValueError(f"{os.path.dirname(self.path_of(0))}: none of the {len(self)} images can be read.")

    def skipping(self, index: int, read: Callable[[], Any]) -> Any:
        """Read an image; None for one that cannot be read, and is skipped.

        Args:
            index: Its index.
            read: Reads it.

        Raises:
            UnreadableImageError: If it cannot be read, and damaged files are not skipped.
        """
        try:
            try:
                return read()
            except MemoryError as error:
                raise unreadable(self.path_of(index), error) from error
        except UnreadableImageError:
            if not self.skip_damaged:
                raise
            self.damaged[index] = True
            return None


class LabelledFiles(AugmentedFiles):
    """Labelled images, decoded when they are asked for. A subclass says where they lie: it has `path` and `decoded`.

    Args:
        labels: int64 `(N,)`.
        augmentation: Makes a training image, uint8 `(3, H, W)`, of the pixels of a decoded one, uint8 `(3, H, W)`.
        evaluation: Makes one for evaluation of an image of Pillow.
        upright: Whether images are turned as their EXIF data say.
        skip_damaged: Whether a file that cannot be decoded is skipped, see `AugmentedFiles`.
    """

    def __init__(
        self,
        labels: Tensor,
        augmentation: Callable[[Tensor], Tensor],
        evaluation: Callable[[Image.Image], Tensor],
        upright: bool = True,
        skip_damaged: bool = False,
    ) -> None:
        self.labels = labels
        self.augmentation, self.evaluation = augmentation, evaluation
        self.upright, self.skip_damaged = upright, skip_damaged
        self.forget_damaged()

    @abstractmethod
    def decoded(self, index: int) -> Image.Image:
        """Decode an image.

        Raises:
            UnreadableImageError: If it cannot be decoded.
        """

    def pixels(self, index: int) -> Tensor:
        """Decode an image to uint8 `(3, H, W)`, for training. A subclass may know a faster way than that of Pillow.

        Raises:
            UnreadableImageError: If it cannot be decoded.
        """
        return tv.pil_to_tensor(self.decoded(index))

    @property
    def strata(self) -> Tensor:
        return self.labels

    def take(self, indices: Tensor) -> Self:
        subset = copy.copy(self)
        subset.labels = self.labels[indices]
        subset.forget_damaged(self.damaged[indices])
        return subset

    def evaluation_sample(self, index: int) -> Any:
        return self._sample(index, lambda: self.evaluation(self.decoded(index)))

    def training_sample(self, index: int) -> Any:
        return self._sample(index, lambda: self.augmentation(self.pixels(index)))

    def empty_batch(self) -> tuple[Tensor, Tensor]:
        blank = self.evaluation(Image.new("RGB", (64, 64)))
        return blank[None][:0], self.labels[:0]

    def _sample(self, index: int, make: Callable[[], Tensor]) -> Any:
        label = int(self.labels[index])
        return self.skipping(index, lambda: (make(), label))


class ImageFiles(LabelledFiles):
    """Labelled image files in a folder, decoded when they are asked for.

    Args:
        folder: Folder of the files.
        names: Paths of the files, relative to the folder.
        labels: int64 `(N,)`.
        augmentation: Makes a training image, uint8 `(3, H, W)`, of the pixels of a decoded one, uint8 `(3, H, W)`.
        evaluation: Makes one for evaluation of an image of Pillow.
        upright: Whether images are turned as their EXIF data say.
        skip_damaged: Whether a file that cannot be decoded is skipped, see `AugmentedFiles`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        names: Sequence[str],
        labels: Tensor,
        augmentation: Callable[[Tensor], Tensor],
        evaluation: Callable[[Image.Image], Tensor],
        upright: bool = True,
        skip_damaged: bool = False,
    ) -> None:
        super().__init__(labels, augmentation, evaluation, upright, skip_damaged)
        self.folder = folder
        # One block of memory: forked processes would copy a list of strings as soon as they count references to them
        self.names = np.array([os.fsencode(name) for name in names])

    def take(self, indices: Tensor) -> Self:
        subset = super().take(indices)
        subset.names = self.names[indices.numpy()]
        return subset

    def path_of(self, index: int) -> str:
        """Return the path of a file."""
        return os.path.join(self.folder, os.fsdecode(self.names[index]))

    def decoded(self, index: int) -> Image.Image:
        return decoded(self.path_of(index), self.upright)

    def pixels(self, index: int) -> Tensor:
        return pixels(self.path_of(index), self.upright)
