"""Pictures of `knl benchmark`."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from knlightning.analysis.benchmark import VARIANTS, Row

COLUMNS = (
    ("step_ms", "training step, ms", 1.0),
    ("evaluation_ms", "evaluation, ms", 1.0),
    ("step_peak", "step peak, MB", 1e6),
    ("evaluation_peak", "evaluation peak, MB", 1e6),
    ("kept", "kept for backward, MB", 1e6),
    ("flops", "forward pass, GFLOP", 1e9),
)
"""Measure, heading, and the unit in which it is shown."""


def draw_bars(rows: Sequence[Row]) -> Figure:
    """Draw a bar for each row and measure, relative to the floor; no bars where there is no floor."""
    figure = Figure(figsize=(14, 1 + 0.3 * len(rows)), layout="constrained")
    all_axes: Sequence[Axes] = figure.subplots(1, len(COLUMNS), sharey=True)
    for axes, (key, title, _) in zip(all_axes, COLUMNS, strict=True):
        for i, row in enumerate(rows):
            ratio = row[f"{key}_over_floor"]
            axes.barh(i, ratio or 0.0, color=f"C{VARIANTS.index(row['variant'])}")
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
    """Draw each measure against the resolution: a colour for each variant, a line style for each stride."""
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    lines = dict.fromkeys((row["variant"], row["stride"]) for row in rows)
    for axes, (key, title, unit) in zip(figure.subplots(2, len(COLUMNS) // 2).flat, COLUMNS, strict=True):
        for variant, stride in lines:
            points = [
                (row["resolution"], row[key]) for row in rows if (row["variant"], row["stride"]) == (variant, stride)
            ]
            axes.plot(
                [x for x, y in points if y is not None],
                [y / unit for x, y in points if y is not None],
                ("-", "--", ":")[stride - 1],
                marker="o",
                color=f"C{VARIANTS.index(variant)}",
                label=f"{variant}, stride {stride}",
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())
        axes.set_xlabel("height and width")
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=7)
    return figure
