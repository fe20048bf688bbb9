"""Scenes composed of scikit-learn's digits, with a label for each pixel: segmentation that needs no download."""

import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from knlightning.data.base import HELD_OUT, LabelledImages, Scaling, TensorImages
from knlightning.data.digits import MOST_INK, read_ink
from knlightning.data.segmentation import IGNORED, SegmentationDataModule
from knlightning.data.transforms import random_crop

BLOCK = 64
"""So many scenes are composed at a time."""
DIGIT_SIZES = (14.0, 30.0)
"""Least and largest height of a digit in pixels, its margin included."""
PIXELS_A_DIGIT = 800
TRIES = 10
"""Places that are drawn for a digit; it takes the one farthest from the others."""
INKED, UNCERTAIN = 0.5, 0.25
"""Shares of full ink: from the first on a pixel is the digit's, below the second it is the ground's."""


class DigitScenesDataModule(SegmentationDataModule):
    """Light digits of various sizes, colours and angles on a cloudy, unevenly lit ground: 11 classes.

    The digits are those of `DigitsDataModule`, in its fixed split: no digit of a training scene occurs in a test scene.
    A pixel that a digit covers with half of its full ink or more is of the digit's class, one with less than a quarter
    is of the ground (class 0), and those in between, at the edges of strokes, do not count (255). Where digits overlap
    the later one is seen.

    Scenes are composed when they are first needed, and are always the same; more scenes begin with the fewer ones.
    While training they are shifted by up to four pixels; what comes into view is black, and does not count. They are
    not mirrored: a mirrored digit is another sign.

    Args:
        image_size: `(height, width)` of the scenes, 32 or more each; there is about one digit to 1000 pixels.
        train_scenes: Number of training scenes.
        eval_scenes: Number of validation scenes, and of test scenes.
        batch_size: Training scenes in a batch, on each device.
        eval_batch_size: The same for validation and test; None for `batch_size`. Predictions are made one image at a
            time.
        scaling: `unit` divides pixels by 255; `standard` then subtracts the mean and divides by the standard deviation
            of the training scenes.
        augment: Whether training scenes are shifted.
        val_split: Fraction of the training digits, 0 to below 1, held out with the same share of each class; validation
            scenes are composed of them. With 0 **the test scenes serve for validation**.
        split_seed: Seed of that split.
        num_workers: Processes that read the files in `predict_dir`; scenes in memory need none.
        pin_memory: Whether batches are put into page-locked memory; None if training on a CUDA device.
        predict_dir: Folder of images to predict on, at their own size.

    Raises:
        ValueError: An argument is out of range.
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

    def __init__(
        self,
        image_size: tuple[int, int] = (64, 64),
        train_scenes: int = 1000,
        eval_scenes: int = 200,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        scaling: Scaling = "unit",
        augment: bool = True,
        val_split: float = 0.0,
        split_seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        predict_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            scaling=scaling,
            val_split=val_split,
            split_seed=split_seed,
            num_workers=num_workers,
            pin_memory=pin_memory,
            predict_dir=predict_dir,
        )
        for name, value, allowed, ok in (
            ("image_size", image_size, "a height and a width of 32 or more", min(image_size) >= 32),
            ("train_scenes", train_scenes, "1 or more", train_scenes >= 1),
            ("eval_scenes", eval_scenes, "1 or more", eval_scenes >= 1),
        ):
            if not ok:
                raise ValueError(f"{name}={value!r}: must be {allowed}.")
        self.image_size = image_size
        self.train_scenes, self.eval_scenes = train_scenes, eval_scenes
        self.augment = augment

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

    def _load(self, source: str) -> TensorImages:
        """Compose the scenes of a part."""
        ink, labels = read_ink(train=source != self._test)
        if source != self._test and self.val_split > 0:
            # split as images are: by their labels, here with their numbers in place of pixels
            parts = super()._split(TensorImages(torch.arange(len(ink)), labels))
            numbers, labels = parts[source == HELD_OUT][:]
            ink = ink[numbers]
        count = self.train_scenes if source == self._train else self.eval_scenes
        seed = (self._train, HELD_OUT, self._test).index(source)
        return TensorImages(*compose_scenes(ink, labels, count, self.image_size, seed))

    def _split(self, data: LabelledImages) -> tuple[LabelledImages, LabelledImages]:
        """Return both parts: digits are held out before they are put into scenes, or both would show the same."""
        return data, self._load(HELD_OUT)


def compose_scenes(ink: Tensor, labels: Tensor, count: int, size: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Compose scenes of digits.

    Args:
        ink: uint8 `(M, 1, 8, 8)`, 0 to `MOST_INK`.
        labels: int64 `(M,)`, the digits, 0 to 9.
        count: Number of scenes `N`.
        size: `(height, width)` of a scene.
        seed: The scenes are a function of it and of the digits.

    Returns:
        Images, uint8 `(N, 3, height, width)`, and labels, uint8 `(N, height, width)`: 0 for the ground, 1 to 10 for
        the digits, 255 for pixels that do not count.
    """
    blocks = [
        _compose(
            ink.float() / MOST_INK,
            labels,
            size,
            torch.Generator().manual_seed(int(np.random.SeedSequence([seed, block]).generate_state(1)[0])),
        )
        for block in range(math.ceil(count / BLOCK))
    ]
    images, masks = (torch.cat(parts)[:count] for parts in zip(*blocks, strict=True))
    return images, masks


def _compose(ink: Tensor, labels: Tensor, size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Compose a block of scenes."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(BLOCK, *shape, generator=generator)

    height, width = size
    clouds = F.interpolate(uniform(0, 0.35, 3, 5, 5), size, mode="bicubic")
    images = uniform(0, 0.25, 3, 1, 1) + clouds
    masks = torch.zeros(BLOCK, height, width, dtype=torch.uint8)
    places: list[tuple[Tensor, Tensor]] = []
    for slot in range(max(1, round(height * width / PIXELS_A_DIGIT))):
        chosen = torch.randint(len(ink), (BLOCK,), generator=generator)
        # a fifth of the places stay empty, but no scene does
        present = uniform(0, 1) < (0.8 if slot else 1.1)
        sizes = uniform(*DIGIT_SIZES)
        centres = _place(sizes, uniform(0, 1, TRIES, 2), size, places)
        places.append((centres, sizes * present))
        angles = uniform(-0.25, 0.25)
        drawn = _draw(ink[chosen], centres, sizes, angles, size) * present.view(-1, 1, 1, 1)
        opacity = ((drawn - UNCERTAIN) / (INKED - UNCERTAIN)).clamp(0, 1)
        images = images + opacity * (uniform(0.5, 1, 3, 1, 1) - images)
        covered = drawn.squeeze(1)
        masks[covered >= UNCERTAIN] = IGNORED
        masks = torch.where(covered >= INKED, (labels[chosen] + 1).to(torch.uint8).view(-1, 1, 1), masks)
    # light from one side
    directions = uniform(0, 2 * math.pi, 1, 1)
    rows, columns = torch.linspace(-0.5, 0.5, height).view(-1, 1), torch.linspace(-0.5, 0.5, width)
    light = 0.75 + 0.35 * (directions.sin() * rows + directions.cos() * columns)
    noise = 0.06 * torch.randn(images.shape, generator=generator)
    images = images * light.unsqueeze(1) + noise
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), masks


def _place(sizes: Tensor, tries: Tensor, size: tuple[int, int], places: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Choose places for one digit in each scene.

    Args:
        sizes: `(N,)`, of the digits, in pixels.
        tries: `(N, TRIES, 2)`, uniform on 0 to 1.
        size: `(height, width)` of the scenes.
        places: Centres `(N, 2)` and sizes `(N,)` of the digits that are there; a size of 0 stands for none.

    Returns:
        Centres `(N, 2)`, row and column in pixels, such that the digits are inside of the scenes.
    """
    centres = sizes.view(-1, 1, 1) / 2 + tries * (torch.tensor(size) - sizes.view(-1, 1, 1))
    distance = torch.full(tries.shape[:2], math.inf)
    for other, other_sizes in places:
        apart = (centres - other.unsqueeze(1)).norm(dim=-1) - (sizes + other_sizes).unsqueeze(1) / 2
        distance = torch.where(other_sizes.unsqueeze(1) > 0, distance.minimum(apart), distance)
    return centres[torch.arange(len(centres)), distance.argmax(1)]


def _draw(ink: Tensor, centres: Tensor, sizes: Tensor, angles: Tensor, size: tuple[int, int]) -> Tensor:
    """Draw one digit on each of many sheets.

    Args:
        ink: `(N, 1, 8, 8)`.
        centres: `(N, 2)`, row and column in pixels.
        sizes: `(N,)`, height and width in pixels.
        angles: `(N,)`, by which the digits are turned, in radians.
        size: `(height, width)` of the sheets.

    Returns:
        Ink on the sheets, `(N, 1, height, width)`.
    """
    height, width = size
    down, right = (torch.tensor([height / 2, width / 2]) - centres).unbind(1)
    sine, cosine = angles.sin(), angles.cos()
    # where a pixel of the sheet, -1 to 1 in both directions, lies in the digit
    rows = [
        [cosine * width, sine * height, 2 * (cosine * right + sine * down)],
        [-sine * width, cosine * height, 2 * (cosine * down - sine * right)],
    ]
    theta = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1) / sizes.view(-1, 1, 1)
    grid = F.affine_grid(theta, [len(ink), 1, height, width], align_corners=False)
    return F.grid_sample(ink, grid, align_corners=False)
