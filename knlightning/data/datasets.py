"""Datasets of labelled images: in memory, or in files that are decoded when asked for."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from knlightning.data.samplers import SeededIndex, SeededSampler, TrainSampler
from knlightning.protocols import batch_independent


class LabelledImages(Dataset[Any], ABC):
    """Images with labels, of which a subset can be taken.

    Attributes:
        train_sampler: Makes the indices that training asks for. A dataset that augments images itself must be asked by
            `SeededIndex`, see `AugmentedImages`.
    """

    train_sampler: Callable[..., TrainSampler] = TrainSampler

    @property
    @abstractmethod
    def strata(self) -> Tensor:
        """Group of each image, int64 `(N,)`; a split keeps the share of each group."""

    def __len__(self) -> int:
        return len(self.strata)

    @abstractmethod
    def take(self, indices: Tensor) -> Self:
        """Return a subset, without copying images.

        Args:
            indices: Indices of its images, int64.
        """

    @staticmethod
    @batch_independent()
    def collate(samples: Any) -> tuple[Tensor, Tensor]:
        """Make a batch, uint8 images `(N, C, H, W)` and their labels, of what is read for its indices."""
        images, labels = default_collate(samples)
        return images, labels

    def empty_batch(self) -> tuple[Tensor, Tensor]:
        """Return a batch for evaluation of no images, in the shape of others: for a process that has none."""
        images, labels = self.collate([self[0]])
        return images[:0], labels[:0]

    def check_eval_batch_size(self, batch_size: int) -> None:
        """Check that evaluation images can share a batch.

        Args:
            batch_size: Their number in a batch.

        Raises:
            ArgumentError: If they differ in size, and the batch size is above 1.
        """

    def report(self) -> None:
        """Warn of what was met since the last report; called whenever a loader has gone through the images."""


class AugmentedImages(LabelledImages):
    """Images that the dataset augments itself, one by one, in the process that reads them.

    An index gives an image for evaluation. A `SeededIndex` gives one for training; its random numbers are a function of
    that index alone.
    """

    train_sampler: Callable[..., TrainSampler] = SeededSampler

    def __getitem__(self, index: int | SeededIndex) -> Any:
        if not isinstance(index, SeededIndex):
            return self.evaluation_sample(index)
        with index.random_numbers():
            return self.training_sample(index.image)

    @abstractmethod
    def evaluation_sample(self, index: int) -> Any:
        """Return an image, not augmented, and its label."""

    @abstractmethod
    def training_sample(self, index: int) -> Any:
        """Return an image, augmented with random numbers of torch's global generator on the CPU, and its label."""


class TensorImages(LabelledImages):
    """Images and labels held in memory, read a whole batch at a time.

    Processes that a DataLoader starts share the images: forked ones inherit them, others receive them in shared memory.
    The datamodules start none: reading a batch from the images takes less time than sending it to another process.

    Args:
        images: uint8 `(N, C, H, W)`.
        labels: int64 `(N,)`; or uint8 `(N, H, W)`, one for each pixel, and then a split is not stratified.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.rows = torch.arange(len(images))

    @property
    def strata(self) -> Tensor:
        return self.labels if self.labels.ndim == 1 else torch.zeros(len(self.labels), dtype=torch.int64)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[self.rows[index]], self.labels[index]

    @batch_independent()
    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return a batch: `(images, labels)`; DataLoader calls this with the indices of a whole batch."""
        chosen = torch.tensor(indices)
        return self.images.index_select(0, self.rows[chosen]), self.labels[chosen]

    def empty_batch(self) -> tuple[Tensor, Tensor]:
        return self.images[:0], self.labels[:0]

    def take(self, indices: Tensor) -> Self:
        subset = copy.copy(self)
        subset.rows, subset.labels = self.rows[indices], self.labels[indices]
        return subset

    @staticmethod
    @batch_independent()
    def collate(samples: Any) -> tuple[Tensor, Tensor]:
        return samples  # whole batches already
