"""Base of the datamodules for images that fit into memory."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from knlightning.data.base import BaseDataModule
from knlightning.data.datasets import TensorImages
from knlightning.data.samplers import Sampling
from knlightning.protocols import batch_independent


class ImageDataModule(BaseDataModule):
    """Base of the datamodules for labelled images that fit into memory.

    As soon as a batch is on its device, its images are augmented (while training only) and scaled to float.

    A dataset of your own is a subclass that says what its classes are called, what the mean and the standard deviation
    of its pixels are, and how to read it:

        class PetsDataModule(ImageDataModule):
            class_names = ("cat", "dog")
            mean = (0.48, 0.45, 0.40)
            std = (0.23, 0.22, 0.22)
            image_size = (32, 32)

            def read(self, train):
                with numpy.load("pets_train.npz" if train else "pets_test.npz") as file:
                    return torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])

    `read` returns uint8 images `(N, 3, 32, 32)` and int64 labels. Override `augmentation` too, and the images are
    augmented while training.

    Args:
        augment: Whether training images are augmented at random, in the way of the dataset.
        num_workers: Processes that read the files in `predict_dir`; images in memory need none.
        kwargs: Arguments of `BaseDataModule`. With `val_split` 0 **the test images serve for validation**, as in papers
            that report the accuracy of a fixed schedule.

    Raises:
        ArgumentError: If an argument is out of range.
    """

    sampling = Sampling(val="test")

    def __init__(self, *, augment: bool = True, num_workers: int = 0, **kwargs: Any) -> None:
        super().__init__(num_workers=num_workers, **kwargs)
        self.augment = augment

    @abstractmethod
    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        """Read the training images, or the test images.

        Args:
            train: Which of the two.

        Returns:
            Images, uint8 `(N, C, H, W)`, and labels, int64 `(N,)`, 0 to `num_classes - 1`.
        """

    @batch_independent()
    def augmentation(self, images: Tensor) -> Tensor:
        """Augment a batch of training images at random; a subclass says how. Here they stay as they are.

        Args:
            images: uint8 `(N, C, H, W)`, on the device that trains.

        Returns:
            Tensor of the same dtype.
        """
        return images

    @batch_independent("augmentation")
    def prepared(self, images: Tensor, train: bool) -> Tensor:
        """Augment training images, and scale.

        Args:
            images: uint8 `(N, C, H, W)`, on the device where they are needed.
            train: Whether they are training images.

        Returns:
            float32 of the same shape.
        """
        return super().prepared(self.augmentation(images) if train and self.augment else images, train)

    def load(self, split: str) -> TensorImages:
        """Read a split, and check images and labels.

        Args:
            split: "train" or "test".

        Raises:
            ValueError: If `read` returned other shapes or types than it must, or labels out of range.
        """
        train = split == self.sampling.train
        images, labels = self.read(train)
        where = f"{type(self).__name__}, {'training' if train else 'test'} images"
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != len(self.mean):
            raise ValueError(
                f"{where}: uint8 of shape (N, {len(self.mean)}, H, W) is needed, got {images.dtype} of shape "
                f"{tuple(images.shape)}."
            )
        if labels.dtype != torch.int64 or labels.shape != (len(images),) or len(images) == 0:
            raise ValueError(
                f"{where}: one int64 label for each image, and at least one image, is needed; got "
                f"{len(images)} images, labels {labels.dtype} of shape {tuple(labels.shape)}."
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.num_classes:
            raise ValueError(f"{where}: labels must be 0 to {self.num_classes - 1}, got {low} to {high}.")
        return TensorImages(images, labels)
