"""Maps of classes as colours."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from knlightning.protocols import describe


def palette_of(datamodule: object, num_classes: int) -> Tensor:
    """Return the colours of the classes, and black for labels that are no class.

    Args:
        datamodule: The colours are its `palette` if that has one for each class; otherwise they are matplotlib's.
            A description of the data will do.
        num_classes: Number of classes.

    Returns:
        RGB, uint8 (num_classes + 1, 3).
    """
    colours: Sequence[Sequence[int]] | None = describe(datamodule).palette
    if colours is None or len(colours) != num_classes:
        from matplotlib import colormaps  # slow to import

        shares = np.array([colormaps["tab20"](k % 20)[:3] for k in range(num_classes)])
        colours = (shares * 255).round().astype(int).tolist()
    return torch.tensor([*colours, (0, 0, 0)], dtype=torch.uint8)


def coloured(label_map: Tensor, palette: Tensor) -> Tensor:
    """Colour a map of classes.

    Args:
        label_map: Classes (..., H, W), integers.
        palette: From `palette_of`.

    Returns:
        RGB, uint8 (..., H, W, 3).
    """
    num_classes = len(palette) - 1
    return palette[label_map.long().where((label_map >= 0) & (label_map < num_classes), num_classes)]
