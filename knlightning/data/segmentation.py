"""Base of the datamodules for semantic segmentation."""

import os
from typing import Any

from torch import Tensor

from knlightning.data.base import BaseDataModule
from knlightning.data.folder import FolderImages
from knlightning.protocols import batch_independent

IGNORED = 255
"""Label of the pixels that count neither in the loss nor in the metrics."""


class SegmentationDataModule(BaseDataModule):
    """Base of the datamodules whose images have a label for each pixel.

    As they reach the task, batches for training and evaluation are `(images, labels)`, float `(N, C, H, W)` and int64
    `(N, H, W)`, where labels are 0 to `num_classes - 1`, or 255 for pixels that do not count. Loaders give uint8
    labels. Batches for prediction are `(images, paths)` of one image each, at its own size.

    A dataset of your own is a subclass with the attributes below, and `load`: for images and masks in files it returns
    `MaskedFiles`, which augments the training images.

    Arguments are those of `BaseDataModule`.

    Attributes:
        palette: Colour of each class, red, green and blue of 0 to 255.
        label_ids: Number of each class in label files.
        ignore_index: Label of the pixels that do not count, 255.
    """

    palette: tuple[tuple[int, int, int], ...]
    label_ids: tuple[int, ...]
    ignore_index = IGNORED

    def load_predict(self, folder: str | os.PathLike[str]) -> FolderImages:
        return FolderImages(folder, None, skip_damaged=True)

    @batch_independent("prepared")
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
