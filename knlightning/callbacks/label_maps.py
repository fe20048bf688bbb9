"""Maps of classes as colours."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from knlightning.protocols import describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


def add_legend(figure: "Figure", palette: Tensor, names: Sequence[str], shown: Iterable[int]) -> None:
    """Say below a figure which colour is which class.

    Args:
        figure: The figure, with a constrained layout.
        palette: From `palette_of`.
        names: Names of the classes, as matplotlib is to write them.
        shown: Classes that the figure shows; their number stands for what is no class.
    """
    from matplotlib.patches import Patch  # slow to import

    labels = [*names, "not counted"]
    colours = {k: tuple((palette[k] / 255).tolist()) for k in sorted(set(shown))}
    patches = [Patch(facecolor=colour, edgecolor="grey", label=labels[k]) for k, colour in colours.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
