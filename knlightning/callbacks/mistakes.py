"""The worst mistakes of an evaluation, with their images."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from knlightning.callbacks.label_maps import coloured, palette_of
from knlightning.pages import THUMBNAIL_SIDE, Bar, Card, gallery, legend, thumbnail
from knlightning.protocols import DataDescription

MOST_BARS = 3
"""Number of probabilities that are shown with an image."""


class Mistake(NamedTuple):
    """An image that a network does badly on.

    Attributes:
        badness: The larger, the worse: the probability of the class that is wrongly predicted, or the share of the
            pixels that are wrong.
        place: Its place among the images of this process.
        image: Images (C, H, W), uint8: for a class of each pixel the image, its true and its predicted classes, as
            colours.
        label: The true class; -1 if there is one for each pixel.
        classes: The most probable classes.
        probabilities: Theirs.
    """

    badness: float
    place: int
    image: Tensor
    label: int = -1
    classes: Sequence[int] = ()
    probabilities: Sequence[float] = ()


class WorstMistakes:
    """Keeps the worst mistakes."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.kept: list[Mistake] = []

    def candidates(self, badness: Tensor) -> list[int]:
        """Return which images of a batch are to be kept.

        Args:
            badness: Of each image (N,); 0 if it is no mistake.
        """
        enough = len(self.kept) >= self.number
        limit = self.kept[-1].badness if enough and self.kept else 0.0
        worst = badness.topk(min(self.number, len(badness)))
        return [place for value, place in zip(*map(Tensor.tolist, worst), strict=True) if value > limit]

    def add(self, mistakes: Sequence[Mistake]) -> None:
        """Keep the worst of all."""
        self.kept = sorted([*self.kept, *mistakes], key=lambda mistake: -mistake.badness)[: self.number]


def small(image: Tensor) -> Tensor:
    """Make an image (C, H, W) in [0, 1] small, uint8; of more than three channels the first three are kept."""
    image = image[:3] if len(image) >= 3 else image[:1]
    factor = THUMBNAIL_SIDE / max(image.shape[-2:])
    if factor < 1:
        size = [max(1, round(side * factor)) for side in image.shape[-2:]]
        image = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def side_by_side(image: Tensor, labels: Tensor, predicted: Tensor, data: DataDescription, num_classes: int) -> Tensor:
    """Draw an image, its true and its predicted classes; ignored pixels are black in both.

    Args:
        image: Image (C, H, W) in [0, 1].
        labels: True classes (H, W).
        predicted: Predicted classes (H, W).
        data: Has the colours.
        num_classes: Number of classes.

    Returns:
        uint8 (3, h, w).
    """
    step = -(-max(labels.shape) // THUMBNAIL_SIDE)
    palette = palette_of(data, num_classes)
    labels, predicted = labels[::step, ::step].cpu(), predicted[::step, ::step].cpu()
    shown = predicted.where((labels >= 0) & (labels < num_classes), -1)
    drawn = small(image[..., ::step, ::step]).expand(3, -1, -1)
    gap = torch.full((3, drawn.shape[1], max(1, drawn.shape[2] // 40)), 255, dtype=torch.uint8)
    maps = [coloured(part, palette).permute(2, 0, 1) for part in (labels, shown)]
    return torch.cat([drawn, gap, maps[0], gap, maps[1]], dim=2)


def mistakes_gallery(
    mistakes: Sequence[tuple[str, Mistake]], names: Sequence[str], data: DataDescription | None = None
) -> str:
    """Write mistakes as a gallery in HTML.

    Args:
        mistakes: Name of the image, and the mistake.
        names: Names of the classes.
        data: Has the colours, if there is a class for each pixel.
    """
    if not mistakes:
        return '<p class="soft">None: every image was right.</p>'
    of_pixels = mistakes[0][1].label < 0
    cards = [_scene(name, mistake) if of_pixels else _card(name, mistake, names) for name, mistake in mistakes]
    key = legend(names, palette_of(data, len(names))[:-1].tolist()) if of_pixels else ""
    return key + gallery(cards, wide=of_pixels)


def _said(name: str) -> str:
    return f"image {name}" if name.isdecimal() else name


def _scene(name: str, mistake: Mistake) -> Card:
    picture = thumbnail(mistake.image, 4 * THUMBNAIL_SIDE)
    return Card(
        picture, f"{1 - mistake.badness:.1%} of the pixels right", note=f"{_said(name)}: image, truth, prediction"
    )


def _card(name: str, mistake: Mistake, names: Sequence[str]) -> Card:
    shown: list[tuple[Any, float]] = list(zip(mistake.classes, mistake.probabilities, strict=True))[:MOST_BARS]
    kinds = {mistake.classes[0]: "bad", mistake.label: "good"}
    bars = [Bar(names[number], share, kinds.get(number, "")) for number, share in shown]
    return Card(thumbnail(mistake.image), f"is {names[mistake.label]}", bars, _said(name))
