"""Batches for a loop of your own, without a trainer."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from knlightning.checks import check_choice
from knlightning.data.base import BaseDataModule

STAGES = {"train": "fit", "val": "validate", "test": "test"}


def batches(
    data: BaseDataModule, split: Literal["train", "val", "test"], device: str | torch.device = "cpu", epoch: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Hand out the batches of an epoch, as the trainer does.

        for images, labels in batches(data, "train", "cuda", epoch):
            loss = cross_entropy(network(images), labels)

    Loaders give uint8 images, a quarter of the bytes. Here they are on the device, scaled, and for training augmented.

    Args:
        data: The datamodule; what it needs is read.
        split: Which images.
        device: Where the batches go.
        epoch: Number of the epoch, from 0, which orders the training images.

    Yields:
        Images, float32 `(N, C, H, W)`, and labels, int64.

    Raises:
        ArgumentError: If there is no such split.
    """
    check_choice("split", split, list(STAGES))
    data.setup(STAGES[split])
    loader = getattr(data, f"{split}_dataloader")()
    if split == "train":
        loader.sampler.set_epoch(epoch)
    for images, labels in loader:
        yield data.prepared(images.to(device), train=split == "train"), labels.to(device).long()
