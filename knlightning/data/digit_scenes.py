"""A datamodule of scenes composed of scikit-learn's digits: segmentation that needs no download."""

from typing import Any

import torch
from torch import Tensor

from knlightning.checks import check, check_number
from knlightning.data.datasets import LabelledImages, TensorImages
from knlightning.data.digits import read_ink
from knlightning.data.samplers import Sampling
from knlightning.data.scenes import compose_scenes
from knlightning.data.segmentation import SegmentationDataModule
from knlightning.data.splitting import stratified_split
from knlightning.data.transforms import random_crop
from knlightning.protocols import batch_independent

MOST_SCENES = 100_000
"""Largest number of scenes of a kind: they lie in memory, 1.6 GB at their default size."""


class DigitScenesDataModule(SegmentationDataModule):
    """Light digits of various sizes, colours and angles on a cloudy, unevenly lit background: 11 classes.

    The digits are those of `DigitsDataModule`, in its fixed split: no digit of a training scene occurs in a test scene.
    A pixel that a digit covers with half of its full ink or more is of the digit's class, one with less than a quarter
    is of the background ("ground", class 0), and those in between, at the edges of strokes, do not count (255). Where
    digits overlap the later one is seen.

    Scenes are composed when they are first needed, and are always the same; a larger number of scenes begins with those
    of a smaller one. While training they are shifted by up to four pixels; what comes into view is black, and does not
    count. They are not mirrored: a mirrored digit is another sign.

    Args:
        image_size: `(height, width)` of the scenes, 32 or more each; there is about one digit to 1000 pixels.
        train_scenes: Number of training scenes, up to 100,000.
        eval_scenes: Number of validation scenes, and of test scenes, likewise.
        augment: Whether training scenes are shifted.
        batch_size: Training scenes in a batch, on each device.
        num_workers: Processes that read the files in `predict_dir`; scenes in memory need none.
        kwargs: Arguments of `BaseDataModule`. `val_split` holds out training digits, and validation scenes are composed
            of them; with 0 **the test scenes serve for validation**. Predictions are made one image at a time.

    Raises:
        ArgumentError: If an argument is out of range.
    """

    class_names = ("ground", *"0123456789")
    palette = (
        (0, 0, 0),
        (230, 25, 75),
        (60, 180, 75),
        (255, 225, 25),
        (0, 130, 200),
        (245, 130, 48),
        (145, 30, 180),
        (70, 240, 240),
        (240, 50, 230),
        (210, 245, 60),
        (250, 190, 212),
    )
    label_ids = tuple(range(11))
    # of the training scenes as they are by default
    mean = (0.2888, 0.2913, 0.2916)
    std = (0.1719, 0.1709, 0.1713)

    sampling = Sampling(val="test")

    def __init__(
        self,
        image_size: tuple[int, int] = (64, 64),
        train_scenes: int = 1000,
        eval_scenes: int = 200,
        augment: bool = True,
        *,
        batch_size: int = 16,
        num_workers: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, **kwargs)
        size_ok = len(image_size) == 2 and min(image_size) >= 32
        check(size_ok, "image_size", image_size, "a height and a width of at least 32")
        check_number("train_scenes", train_scenes, at_least=1, at_most=MOST_SCENES, integer=True)
        check_number("eval_scenes", eval_scenes, at_least=1, at_most=MOST_SCENES, integer=True)
        self.image_size = image_size
        self.train_scenes, self.eval_scenes = train_scenes, eval_scenes
        self.augment = augment

    @batch_independent()
    def augmentation(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Shift each scene by up to four pixels.

        Args:
            images: uint8 `(N, 3, H, W)`, on the device that trains.
            labels: uint8 `(N, H, W)`.

        Returns:
            Tensors of the same shapes.
        """
        # the crop pads by 0: labels that are one higher, where 255 becomes 0, are padded by what is 255 afterwards
        shifted = random_crop(torch.cat([images, (labels + 1).unsqueeze(1)], dim=1), padding=4)
        return shifted[:, :-1], shifted[:, -1] - 1

    @batch_independent("augmentation", "prepared")
    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Augment training scenes, scale, and make labels int64.

        Args:
            batch: uint8 images `(N, 3, H, W)`, and uint8 labels `(N, H, W)` or paths.
            dataloader_idx: Unused; Lightning gives it.

        Returns:
            Float images, in the trainer's precision, and int64 labels or the paths.
        """
        if self.augment and self.trainer is not None and self.trainer.training:
            batch = self.augmentation(*batch)
        return super().on_after_batch_transfer(batch, dataloader_idx)

    def load(self, split: str) -> TensorImages:
        """Compose the scenes of a split.

        Raises:
            ArgumentError: If the digits cannot be split by `val_split`.
        """
        if split == self.sampling.train:
            return self._scenes(self._train_digits()[0], self.train_scenes, seed=0)
        return self._scenes(_digits(train=False), self.eval_scenes, seed=2)

    def hold_out(self, train: LabelledImages) -> tuple[LabelledImages, LabelledImages]:
        """Return the training scenes, and those composed of the digits that were held out before."""
        return train, self._scenes(self._train_digits()[1], self.eval_scenes, seed=1)

    def _train_digits(self) -> tuple[TensorImages, TensorImages]:
        """Return the digits to train on and those held out: scenes that share digits would not test generalization."""
        digits = _digits(train=True)
        if self.val_split == 0:
            return digits, digits.take(torch.arange(0))
        return stratified_split(digits, self.val_split, self.split_seed)

    def _scenes(self, digits: TensorImages, num_scenes: int, seed: int) -> TensorImages:
        ink = digits.images[digits.rows]
        return TensorImages(*compose_scenes(ink, digits.labels, num_scenes, self.image_size, seed))


def _digits(train: bool) -> TensorImages:
    return TensorImages(*read_ink(train))
