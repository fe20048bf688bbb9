"""A dataset of labelled image files, decoded when they are asked for."""

import copy
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from knlightning.data.datasets import AugmentedImages
from knlightning.data.folder import abbreviated, decoded
from knlightning.protocols import batch_independent


class ImageFiles(AugmentedImages):
    """Labelled image files, decoded when they are asked for.

    Args:
        folder: Folder of the files.
        names: Paths of the files, relative to the folder.
        labels: int64 `(N,)`.
        augmentation: Makes a training image, uint8 `(3, H, W)`, of a decoded one.
        evaluation: The same for evaluation.
        upright: Whether images are turned as their EXIF data say.
        skip_damaged: Whether a file that cannot be decoded is skipped. If not, it is an error. If so, training gets
            the next file in the list that can be decoded, with the label of that one, and evaluation gets None.

    Attributes:
        damaged: bool `(N,)`, which files could not be decoded so far; shared by all processes that read.
    """

    damaged: Tensor
    _reported: int

    def __init__(
        self,
        folder: str | os.PathLike[str],
        names: Sequence[str],
        labels: Tensor,
        augmentation: Callable[[Image.Image], Tensor],
        evaluation: Callable[[Image.Image], Tensor],
        upright: bool = True,
        skip_damaged: bool = False,
    ) -> None:
        self.folder = folder
        # One block of memory: forked processes would copy a list of strings as soon as they count references to them
        self.names = np.array([os.fsencode(name) for name in names])
        self.labels = labels
        self.augmentation, self.evaluation = augmentation, evaluation
        self.upright, self.skip_damaged = upright, skip_damaged
        self._forget_damaged()

    @property
    def strata(self) -> Tensor:
        return self.labels

    def take(self, indices: Tensor) -> Self:
        subset = copy.copy(self)
        subset.names, subset.labels = self.names[indices.numpy()], self.labels[indices]
        subset._forget_damaged()
        return subset

    @staticmethod
    @batch_independent()
    def collate(samples: Any) -> tuple[Tensor, Tensor]:
        read = [sample for sample in samples if sample is not None]
        return AugmentedImages.collate(read) if read else (torch.empty(0), torch.empty(0))

    def evaluation_sample(self, index: int) -> tuple[Tensor, int] | None:
        image = self._decoded(index)
        return None if image is None else (self.evaluation(image), int(self.labels[index]))

    def training_sample(self, index: int) -> tuple[Tensor, int]:
        first = index
        while (image := self._decoded(index)) is None:
            index = (index + 1) % len(self)
            if index == first:
                raise ValueError(f"{self.folder}: none of the {len(self)} images can be read.")
        return self.augmentation(image), int(self.labels[index])

    def path(self, index: int) -> str:
        """Return the path of a file."""
        return os.path.join(self.folder, os.fsdecode(self.names[index]))

    def report(self) -> None:
        """Warn of damaged files, if more were met since the last report."""
        found = self.damaged.nonzero()[:, 0].tolist()
        if len(found) > self._reported:
            self._reported = len(found)
            warnings.warn(
                f"{len(found)} of the {len(self)} images could not be read so far, and were left out (in training, "
                f"others took their places): {abbreviated([self.path(index) for index in found])}.",
                stacklevel=2,
            )

    def _forget_damaged(self) -> None:
        self._reported = 0
        self.damaged = torch.zeros(len(self), dtype=torch.bool).share_memory_()

    def _decoded(self, index: int) -> Image.Image | None:
        try:
            return decoded(self.path(index), self.upright)
        except ValueError:
            if not self.skip_damaged:
                raise
            self.damaged[index] = True
            return None
