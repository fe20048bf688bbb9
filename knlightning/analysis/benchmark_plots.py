"""Pictures of `knl benchmark`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from knlightning.analysis.benchmark import Row
from knlightning.analysis.curves import COLOURS

COLUMNS = (
    ("step_ms", "training step, ms", 1.0),
    ("evaluation_ms", "evaluation, ms", 1.0),
    ("step_peak", "step peak, MB", 1e6),
    ("evaluation_peak", "evaluation peak, MB", 1e6),
    ("kept", "kept for backward, MB", 1e6),
    ("flops", "forward pass, GFLOP", 1e9),
)
"""Measure, heading, and the unit in which it is shown."""
NORM_OF = {"floor": "none", "algorithm1": "kernel", "batch-primitives": "batch"}
"""Normalization of a variant that has another name; a second implementation of one is hatched or dashed."""


def colour_of(variant: str) -> str:
    """Return the colour of a variant: that of its normalization."""
    return COLOURS[NORM_OF.get(variant, variant)]


def is_second(variant: str) -> bool:
    """Say whether a variant is a second implementation of a normalization."""
    return variant in ("algorithm1", "batch-primitives")


def draw_bars(rows: Sequence[Row]) -> Figure:
    """Draw a bar for each row and measure, relative to the floor; no bars where there is no floor."""
    figure = Figure(figsize=(14, 1 + 0.3 * len(rows)), layout="constrained")
    all_axes: Sequence[Axes] = figure.subplots(1, len(COLUMNS), sharey=True)
    for axes, (key, title, _) in zip(all_axes, COLUMNS, strict=True):
        for i, row in enumerate(rows):
            ratio = row[f"{key}_over_floor"]
            colour = colour_of(row["variant"])
            (bar,) = axes.barh(i, ratio or 0.0, color=colour)
            if is_second(row["variant"]):
                bar.set(facecolor="white", edgecolor=colour, hatch="////")
            text = row["status"] if row["status"] != "ok" else "" if ratio is None else f"{ratio:.2f}"
            axes.annotate(text, (ratio or 0.0, i), (3, 0), textcoords="offset points", va="center", fontsize=7)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.margins(x=0.25)
        axes.set_title(f"{title.partition(',')[0]}\nrelative to the floor", fontsize=9)
    names = [f"{row['setting']}: {row['variant']}" for row in rows]
    all_axes[0].set_yticks(range(len(rows)), names, fontsize=7)
    all_axes[0].invert_yaxis()
    return figure


def draw_scaling(rows: Sequence[Row]) -> Figure:
    """Draw each measure against the resolution: a row of panels for each measure, a column for each stride.

    Each line has its name at its end; the lines of a measure share an axis, which is logarithmic.
    """
    strides = sorted({row["stride"] for row in rows})
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    figure = Figure(figsize=(1 + 2.6 * len(strides), 1 + 1.4 * len(COLUMNS)), layout="constrained")
    grid = figure.subplots(len(COLUMNS), len(strides), sharex=True, sharey="row", squeeze=False)
    ends: dict[Axes, dict[str, tuple[float, float]]] = {axes: {} for axes in grid.flat}
    for line, (key, title, unit) in zip(grid, COLUMNS, strict=True):
        for axes, stride in zip(line, strides, strict=True):
            for variant in variants:
                mine = [row for row in rows if (row["variant"], row["stride"]) == (variant, stride)]
                points = [(row["resolution"], row[key] / unit) for row in mine if row[key]]
                if points:
                    style = "--" if is_second(variant) else "-"
                    axes.plot(*zip(*points, strict=True), style, marker="o", markersize=4, color=colour_of(variant))
                    ends[axes][variant] = points[-1]
            axes.set(xscale="log", yscale="log")
            axes.grid(alpha=0.3)
        line[0].set_ylabel(f"{title}\n(logarithmic)", fontsize=9)
    for axes, stride in zip(grid[0], strides, strict=True):
        axes.set_title(f"stride {stride}", fontsize=10)
    resolutions = sorted({row["resolution"] for row in rows})
    for axes, named in ends.items():
        _name_ends(axes, named)
        axes.set_xticks(resolutions, [str(side) for side in resolutions], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_xlim(resolutions[0] / 1.15, resolutions[-1] * 2.2)  # room for the names
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    for axes in grid[-1]:
        axes.set_xlabel("height and width (logarithmic)", fontsize=9)
    return figure


def _name_ends(axes: Axes, ends: Mapping[str, tuple[float, float]]) -> None:
    """Write the name of each line beside its end; names of lines that end close together move apart."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    gap = 0.14 * (high - low)
    named = sorted(ends.items(), key=lambda item: item[1][1])
    places: list[float] = []
    for _, (_, y) in named:
        places.append(max([math.log(y), *(place + gap for place in places[-1:])]))
    shift = sum(math.log(y) for _, (_, y) in named) / max(len(named), 1) - sum(places) / max(len(places), 1)
    shift = min([shift, *(high - gap / 2 - place for place in places[-1:])])
    for (variant, (x, _)), place in zip(named, places, strict=True):
        position = (x, math.exp(place + shift))
        offset: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points"}
        axes.annotate(variant, position, va="center", fontsize=7, color=colour_of(variant), **offset)
