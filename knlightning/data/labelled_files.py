"""Base of the datamodules for labelled images that are decoded while they are trained on."""

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from knlightning.checks import check_number
from knlightning.data.base import BaseDataModule, Scaling
from knlightning.data.decoding import fitted
from knlightning.data.folder import FolderImages
from knlightning.data.samplers import Sampling
from knlightning.data.transforms import random_erasing
from knlightning.protocols import batch_independent

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LEAST_AREA = 0.08
"""Least part of an image that a random crop shows."""
ASPECT_RATIO = 4 / 3
"""Largest width over height of a random crop, and height over width."""
ATTEMPTS = 10
"""How many crops are drawn, of which the first that fits into the image is taken."""


class RandomCropAndFlip:
    """Crop an image to a random part, scale that to a size, and mirror it with probability 1/2.

    Parts are distributed as those of torchvision's `RandomResizedCrop`; random numbers are drawn all at once, and
    nothing is looked up for each image, which takes a tenth of the time from file to batch less.

    Args:
        size: Height and width afterwards.
    """

    def __init__(self, size: int) -> None:
        self.size = [size, size]

    def __call__(self, image: Tensor) -> Tensor:
        """Return a part of an image, uint8 `(3, size, size)`.

        Args:
            image: uint8 `(3, H, W)`.
        """
        *draws, mirrored = torch.rand(4 * ATTEMPTS + 1, dtype=torch.float64).tolist()
        top, left, height, width = random_part(image.shape[1], image.shape[2], draws)
        part = tv.resize_image(image[:, top : top + height, left : left + width], self.size)
        return part.flip(-1) if mirrored < 0.5 else part


def random_part(height: int, width: int, draws: list[float]) -> tuple[int, int, int, int]:
    """Return a random part of an image: top, left, height and width; where no attempt fits, the largest in the middle.

    Args:
        height: Height of the image.
        width: Width of the image.
        draws: Random numbers from 0 to 1, four for each attempt.
    """
    for attempt in range(0, len(draws), 4):
        area, shape, top, left = draws[attempt : attempt + 4]
        area = height * width * (LEAST_AREA + (1 - LEAST_AREA) * area)
        ratio = ASPECT_RATIO ** (2 * shape - 1)
        rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            return int(top * (height - rows + 1)), int(left * (width - columns + 1)), rows, columns
    rows, columns = min(height, round(width * ASPECT_RATIO)), min(width, round(height * ASPECT_RATIO))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


class LabelledFilesDataModule(BaseDataModule):
    """Base of the datamodules for labelled images that are decoded while they are trained on, in worker processes.

    A training image is cropped to a random part of 8 to 100 % of its area with an aspect ratio of 3/4 to 4/3, scaled,
    and mirrored with probability 1/2; an image to evaluate, or to predict on, is scaled by its shorter side and
    cropped to its centre. How an image is augmented is a function of the run's seed, the epoch, the image and the
    repetition alone, so that runs are equal with any number of processes, and when resumed. Images come to the device
    as uint8 and are scaled to float there.

    A subclass overrides `load`, which makes `LabelledFiles` with `augmentation`, `evaluation`, `upright` and
    `skip_damaged`. It puts the names of its splits into `sampling`.

    Args:
        train_size: Height and width of training images.
        eval_resize: Length to which the shorter side of other images is scaled.
        eval_size: Height and width of their centre crop.
        trivial_augment: Whether each training image is changed by one random operation too (`TrivialAugmentWide`).
        random_erasing: Probability with which a random rectangle of a training image is set to the mean colour. It is
            drawn on the device, for the whole batch.
        repeated_augmentation: How many times an epoch shows each of the images that it shows, each time augmented
            differently. The length of the epoch stays, so that it shows fewer different images. See `TrainSampler`.
        augment: Whether training images are augmented; if not, they are made as those of evaluation are.
        skip_damaged: Whether a file that cannot be decoded is skipped, and counted in a warning at the end of an
            epoch; in training, the next file in the list takes its place, so that batches stay full. In private
            training it contributes nothing. If not, it is an error.
        scaling: `unit` divides pixels by 255; `standard` then subtracts ImageNet's mean and divides by its standard
            deviation.
        kwargs: Arguments of `BaseDataModule`. Images that `val_split` holds out take the place of those to validate on.

    Attributes:
        class_names: Empty until data or a checkpoint are read.
        augmentation: Makes a training image, uint8 `(3, H, W)`, of the pixels of a decoded one, uint8 `(3, H, W)`.
        evaluation: Makes an image of evaluation, of one of Pillow.

    Raises:
        ArgumentError: If an argument is out of range.

    Source: TrivialAugment is S. Müller and F. Hutter, ICCV 2021; random erasing is Z. Zhong et al., AAAI 2020.
    """

    class_names: tuple[str, ...] = ()
    mean = IMAGENET_MEAN
    std = IMAGENET_STD
    upright = True
    """Whether images are turned as their EXIF data say when training and evaluating; always when predicting."""

    def __init__(
        self,
        *,
        train_size: int = 224,
        eval_resize: int = 256,
        eval_size: int = 224,
        trivial_augment: bool = False,
        random_erasing: float = 0.0,
        repeated_augmentation: int = 1,
        augment: bool = True,
        skip_damaged: bool = False,
        scaling: Scaling = "standard",
        **kwargs: Any,
    ) -> None:
        super().__init__(scaling=scaling, **kwargs)
        check_number("train_size", train_size, at_least=1, integer=True)
        check_number("eval_size", eval_size, at_least=1, integer=True)
        check_number("eval_resize", eval_resize, at_least=eval_size, integer=True, hint="It must cover eval_size.")
        check_number("random_erasing", random_erasing, at_least=0, at_most=1)
        check_number("repeated_augmentation", repeated_augmentation, at_least=1, integer=True)
        self.skip_damaged = skip_damaged
        self.image_size = (eval_size, eval_size)
        self.eval_resize = eval_resize
        self.sampling = Sampling(repeats=repeated_augmentation)
        self.evaluation: Callable[[Image.Image | Tensor], Tensor] = partial(
            fitted, size=self.image_size, resize=eval_resize
        )
        self.random_erasing = random_erasing if augment else 0.0
        self.augmentation: Callable[[Tensor], Tensor] = self.evaluation
        # Pillow turns and shears faster than torch, and scales more slowly
        trivial = [
            v2.ToPILImage(),
            v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR),
            v2.PILToTensor(),
        ]
        if augment:
            crop = RandomCropAndFlip(train_size)
            self.augmentation = v2.Compose([crop, *trivial]) if trivial_augment else crop

    @batch_independent()
    def prepared(self, images: Tensor, train: bool) -> Tensor:
        """Erase a part of training images, if asked for, and scale.

        Args:
            images: uint8 `(N, C, H, W)`, on the device where they are needed.
            train: Whether they are training images.

        Returns:
            float32 of the same shape.
        """
        if train and self.random_erasing:  # the mean colour is zero once it is scaled by `standard`
            images = random_erasing(images, self.random_erasing, [round(255 * mean) for mean in self.mean])
        return super().prepared(images, train)

    def load_predict(self, folder: str | os.PathLike[str]) -> FolderImages:
        return FolderImages(folder, self.image_size, self.eval_resize, skip_damaged=True)
