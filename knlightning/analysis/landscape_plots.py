"""Pictures of loss landscapes, several networks side by side on one scale."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from knlightning.analysis.curves import styles_of
from knlightning.analysis.landscape import Trajectory

LOWEST_LOSS, HIGHEST_LOSS = 1e-3, 10.0
"""What is lower or higher is drawn as this: the picture is of the width of a valley, not of its depth."""
LEVELS = 14
MOVED = "weights moved, in norms of the filters"
TRAINED = "weights moved; 1: the farthest checkpoint"


def draw_contours(
    surfaces: Mapping[str, np.ndarray], offsets: Sequence[float], trajectories: Mapping[str, Trajectory] | None = None
) -> Figure:
    """Draw contours of the loss, with the same levels and colours for all networks.

    Args:
        surfaces: For each network the losses (rows, columns); NaN where they are not known yet.
        offsets: Places of rows and columns.
        trajectories: For each network how its weights moved in training, if the planes are those of trajectories.
    """
    norm, levels = _scale(surfaces)
    figure = Figure(figsize=(3.2 * len(surfaces) + 1, 3.5), layout="constrained")
    grid = figure.subplots(1, len(surfaces), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (name, losses) in zip(grid, surfaces.items(), strict=True):
        drawn = axes.contourf(offsets, offsets, losses, levels, norm=norm, cmap="viridis", extend="both")
        axes.contour(offsets, offsets, losses, levels, colors="black", linewidths=0.4)
        axes.plot(0, 0, "o", color="white", markersize=3)
        axes.set(title=name, aspect="equal")
        if trajectories:
            axes.plot(*zip(*trajectories[name].places, strict=True), ".-", color="white", linewidth=0.8)
            along, across = (f"component {k}: {share:.0%}" for k, share in enumerate(trajectories[name].explained, 1))
            axes.set(xlabel=along, ylabel=across, xlim=(offsets[0], offsets[-1]), ylim=(offsets[0], offsets[-1]))
    figure.supxlabel(TRAINED if trajectories else MOVED, fontsize="medium")
    figure.colorbar(drawn, ax=list(grid), label="loss (logarithmic)", format="%.2g", ticks=levels[::2])
    return figure


def draw_surfaces(surfaces: Mapping[str, np.ndarray], offsets: Sequence[float]) -> Figure:
    """Draw the loss as surfaces in three dimensions, with the same height and colours for all networks."""
    norm, levels = _scale(surfaces)
    figure = Figure(figsize=(3.6 * len(surfaces), 3.7), layout="constrained")
    for place, (name, losses) in enumerate(surfaces.items(), 1):
        axes: Any = figure.add_subplot(1, len(surfaces), place, projection="3d")
        # axes in three dimensions cannot be logarithmic: the heights are logarithms
        heights = np.log10(np.clip(losses, levels[0], levels[-1]))
        columns, rows = np.meshgrid(offsets, offsets)
        colours = colormaps["viridis"](norm(10**heights))
        axes.plot_surface(columns, rows, heights, facecolors=colours, rstride=1, cstride=1, linewidth=0.2)
        low, high = np.log10(levels[[0, -1]])
        axes.set(zlim=(low, high))
        axes.set_title(name, y=1)  # above it the figure ends
        ticks = np.linspace(low, high, 5)
        axes.set_zticks(ticks, [f"{10**tick:.2g}" for tick in ticks])
        axes.tick_params(labelsize=7)
        axes.locator_params(axis="both", nbins=5)
    return figure


def draw_lines(surfaces: Mapping[str, np.ndarray], offsets: Sequence[float], moved: str = MOVED) -> Figure:
    """Draw the loss along the first direction, and along the second one where it is known.

    Args:
        surfaces: As in `draw_contours`; the middle row and the middle column are drawn.
        offsets: Places of rows and columns.
        moved: What the places are.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    middle = len(offsets) // 2
    for name, style in styles_of(list(surfaces)).items():
        along, across = surfaces[name][middle], surfaces[name][:, middle]
        style["marker"] = ""
        axes.plot(offsets, along, label=name, **style)
        if not np.isnan(across).any():
            axes.plot(offsets, across, alpha=0.5, **style)
    axes.set(xlabel=moved, ylabel="loss (logarithmic)", yscale="log")
    axes.set_ylim(top=min(axes.get_ylim()[1], 2 * HIGHEST_LOSS))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _scale(surfaces: Mapping[str, np.ndarray]) -> tuple[LogNorm, np.ndarray]:
    """Return the common scale of colours and its levels."""
    known = np.concatenate([losses[np.isfinite(losses)] for losses in surfaces.values()])
    low = max(float(known.min()), LOWEST_LOSS)
    high = max(min(float(known.max()), HIGHEST_LOSS), 1.001 * low)
    return LogNorm(low, high), np.geomspace(low, high, LEVELS)
