"""Predictions at a glance: a page of images, each with its most probable classes or with its classes in colours."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from knlightning.callbacks.label_maps import palette_of
from knlightning.callbacks.mistakes import MOST_BARS, small
from knlightning.pages import Bar, Card, gallery, legend, page, text, thumbnail
from knlightning.protocols import DataDescription
from knlightning.run_directory import replacing
from knlightning.text import counted

MOST_IMAGES = 200
"""Most images on a page, for each device."""


class ContactSheet:
    """Keeps the first images that are predicted on, and writes them as a page in HTML.

    Attributes:
        cards: The images, by their names.
    """

    def __init__(self) -> None:
        self.cards: dict[str, Card] = {}
        self._num_classes = 0

    @property
    def full(self) -> bool:
        """Whether there is no more room."""
        return len(self.cards) >= MOST_IMAGES

    def add(self, name: str, image: Tensor, bars: Sequence[tuple[str, float]] = (), num_classes: int = 0) -> None:
        """Add an image, if there is room.

        Args:
            name: Its name.
            image: Image (C, H, W) in [0, 1], or uint8.
            bars: Names and probabilities of the most probable classes.
            num_classes: Number of classes in colours, if the image shows them.
        """
        self._num_classes = max(self._num_classes, num_classes)
        if not self.full:
            image = image.float() / 255 if image.dtype == torch.uint8 else image
            shown = [Bar(bar, share, "" if i else "main") for i, (bar, share) in enumerate(bars[:MOST_BARS])]
            self.cards[name] = Card(thumbnail(small(image)), bars=shown, note=name)

    def write(self, path: Path, total: int, data: DataDescription) -> None:
        """Write the page, sorted by name."""
        names = sorted(self.cards)
        title = f"Predictions of {counted(total, 'image')}"
        part = f'<p class="soft">The first {len(names):,} are shown.</p>' if len(names) < total else ""
        key = ""
        if self._num_classes:
            colours = palette_of(data, self._num_classes)[:-1].tolist()
            key = legend(data.names(self._num_classes), colours)
        body = f"<h1>{text(title)}</h1>{part}{key}\n{gallery(self.cards[name] for name in names)}"
        with replacing(path) as temporary:
            temporary.write_text(page(title, body), encoding="utf-8")
