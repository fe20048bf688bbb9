"""Maps of classes as colours."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Colour = Sequence[int]


def palette_of(datamodule: Any, classes: int) -> Tensor:
    """Return the colours of the classes, black for what lies outside of them.

    Args:
        datamodule: whose `palette` they are, where it has one for as many classes; else they are matplotlib's.
        classes: their number.

    Returns:
        RGB, uint8 (classes + 1, 3).
    """
    given: Sequence[Colour] | None = getattr(datamodule, "palette", None)
    if not given or len(given) != classes:
        from matplotlib import colormaps  # slow to import

        given = (np.array([colormaps["tab20"](k % 20)[:3] for k in range(classes)]) * 255).round().astype(int).tolist()
    return torch.tensor([*given, (0, 0, 0)], dtype=torch.uint8)


def coloured(label_map: Tensor, palette: Tensor) -> Tensor:
    """Colour a map of classes.

    Args:
        label_map: (..., H, W), integers.
        palette: from :func:`palette_of`.

    Returns:
        uint8 (..., H, W, 3).
    """
    classes = len(palette) - 1
    return palette[label_map.long().where((label_map >= 0) & (label_map < classes), classes)]


def stretched(images: Tensor) -> Tensor:
    """Bring images of an unknown scaling to [0, 1], each by itself."""
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    return (images - low) / (high - low).clamp(min=1e-12)
