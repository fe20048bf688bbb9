"""Datasets of labelled image files, decoded when they are asked for."""

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from knlightning.data.datasets import AugmentedImages
from knlightning.data.decoding import UnreadableImageError, decoded, pixels, unreadable
from knlightning.data.folder import warn_of_damaged
from knlightning.data.samplers import SeededIndex
from knlightning.protocols import batch_independent


class EncodedImages(ABC):
    """Encoded images by their number, in files or elsewhere."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def path_of(self, number: int) -> str:
        """Return the path of an image; where it lies in no file of its own, what names it."""

    @abstractmethod
    def find(self, number: int) -> tuple[str, bytes | None]:
        """Return the path of an image, and its content if it lies in no file of its own: arguments of `opened`.

        Raises:
            UnreadableImageError: If there is none.
        """


class FilePaths(EncodedImages):
    """Images in files.

    Args:
        paths: Their paths.
        folder: What they are relative to.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]], folder: str | os.PathLike[str] = "") -> None:
        # One block of memory: forked processes would copy a list of strings as soon as they count references to them
        self.paths, self.folder = np.array([os.fsencode(path) for path in paths]), folder

    def __len__(self) -> int:
        return len(self.paths)

    def path_of(self, number: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self.paths[number]))

    def find(self, number: int) -> tuple[str, bytes | None]:
        return self.path_of(number), None


class AugmentedFiles(AugmentedImages):
    """Encoded images. One that cannot be read may be skipped.

    A subclass sets `images`, `places` and `skip_damaged`, calls `forget_damaged` when it is made, and reads its images
    within `skipping`.

    Attributes:
        images: The encoded images.
        places: int64 `(N,)`, number of each image among these.
        skip_damaged: Whether a file that cannot be read, or for which the memory does not suffice, is skipped. If not,
            it is an error. If so, training gets the next image in the list that can be read, with the label of that
            one, unless the index says that no other may take its place. Then, and in evaluation, None comes.
        damaged: bool `(N,)`, which files could not be read so far; shared by all processes that read.
    """

    images: EncodedImages
    places: np.ndarray
    skip_damaged: bool
    damaged: Tensor
    _reported: int

    def path_of(self, index: int) -> str:
        """Return the path of an image; where it lies in no file of its own, what names it."""
        return self.images.path_of(int(self.places[index]))

    def take(self, indices: Tensor) -> Self:
        subset = copy.copy(self)
        subset.places = self.places[indices.numpy()]
        subset.forget_damaged(self.damaged[indices])
        return subset

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
    """Labelled images, decoded when they are asked for.

    Args:
        images: The images.
        labels: int64 `(N,)`.
        augmentation: Makes a training image, uint8 `(3, H, W)`, of the pixels of a decoded one, uint8 `(3, H, W)`.
        evaluation: Makes one for evaluation of an image of Pillow.
        upright: Whether images are turned as their EXIF data say.
        skip_damaged: Whether a file that cannot be decoded is skipped, see `AugmentedFiles`.
    """

    def __init__(
        self,
        images: EncodedImages,
        labels: Tensor,
        augmentation: Callable[[Tensor], Tensor],
        evaluation: Callable[[Image.Image], Tensor],
        upright: bool = True,
        skip_damaged: bool = False,
    ) -> None:
        self.images, self.labels = images, labels
        self.places = np.arange(len(images))
        self.augmentation, self.evaluation = augmentation, evaluation
        self.upright, self.skip_damaged = upright, skip_damaged
        self.forget_damaged()

    def encoded(self, index: int) -> bytes:
        """Return an image as it is stored.

        Raises:
            OSError: If it cannot be read.
        """
        path, content = self.images.find(int(self.places[index]))
        return Path(path).read_bytes() if content is None else content

    def decoded(self, index: int) -> Image.Image:
        """Decode an image.

        Raises:
            UnreadableImageError: If it cannot be decoded.
        """
        path, content = self.images.find(int(self.places[index]))
        return decoded(path, self.upright, content)

    def pixels(self, index: int) -> Tensor:
        """Decode an image to uint8 `(3, H, W)`, for training, faster than Pillow does where that is possible.

        Raises:
            UnreadableImageError: If it cannot be decoded.
        """
        path, content = self.images.find(int(self.places[index]))
        return pixels(path, self.upright, content)

    @property
    def strata(self) -> Tensor:
        return self.labels

    def take(self, indices: Tensor) -> Self:
        subset = super().take(indices)
        subset.labels = self.labels[indices]
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
        args: Arguments of `LabelledFiles` after the images.
        kwargs: Likewise.
    """

    def __init__(self, folder: str | os.PathLike[str], names: Sequence[str], *args: Any, **kwargs: Any) -> None:
        super().__init__(FilePaths(names, folder), *args, **kwargs)
