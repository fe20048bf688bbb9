"""Pictures of runs, from the `metrics.csv` in their directories, and of comparisons."""

import csv
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

COLOURS = {
    "batch": "#000000",
    "sync_batch": "#000000",
    "layer": "#E69F00",
    "group": "#56B4E9",
    "kernel": "#009E73",
    "none": "#999999",
    "instance": "#D55E00",
    "positional": "#CC79A7",
    "local_context": "#882255",
}
"""Colour of each normalization in every picture; the colour-blind can distinguish them (Okabe and Ito 2008, all but
two)."""
OTHER_COLOURS = ("#0072B2", "#F0E442", *dict.fromkeys(COLOURS.values()))
"""Colours of what is no normalization."""
MARKERS = "osv^DPX<*"


class Style(NamedTuple):
    """How a line of a picture is drawn.

    Attributes:
        color: Its colour.
        marker: Its markers.
        linestyle: Solid, or dashed for the second line of the same colour.
    """

    color: str
    marker: str
    linestyle: str


def styles_of(names: Sequence[str]) -> dict[str, Style]:
    """Give each line its style: the colour of its normalization, and markers that differ.

    Args:
        names: Names of the lines, such as "ResNet-8, batch".
    """
    styles: dict[str, Style] = {}
    others = iter(OTHER_COLOURS * len(names))
    for place, name in enumerate(names):
        norm = next((word for word in re.findall(r"\w+", name) if word in COLOURS), None)
        color = next(others) if norm is None else COLOURS[norm]
        again = sum(style.color == color for style in styles.values())
        styles[name] = Style(color, MARKERS[place % len(MARKERS)], ("-", "--", ":", "-.")[again % 4])
    return styles


SCORES = {"acc": "accuracy", "miou": "mean IoU"}
"""The score of runs of classification, and of segmentation, with its name."""


def read_metrics(run: Path) -> dict[str, list[tuple[float, float]]]:
    """Read the metrics of a run by epoch.

    Args:
        run: Directory of the run.

    Returns:
        For each metric its (epoch, value) in the order of training.

    Raises:
        FileNotFoundError: If the directory holds no metrics.csv.
    """
    path = run / "metrics.csv"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: name the directory of a run, such as runs/quickstart/0")
    metrics: dict[str, list[tuple[float, float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and row.get("epoch") and name not in ("epoch", "step"):
                    metrics.setdefault(name, []).append((float(row["epoch"]), float(value)))
    return metrics


def score_of(runs: Sequence[Path]) -> str:
    """Return the score in `SCORES` that runs have.

    Args:
        runs: Directories of runs.

    Returns:
        Its name, such as "miou"; "acc" if they have none.
    """
    found = [name for run in runs for name in SCORES if f"val/{name}" in read_metrics(run)]
    return found[0] if found else "acc"


def draw_curves(runs: list[Path]) -> Figure:
    """Draw loss and accuracy (or mean IoU) of training (dashed) and validation (solid), one colour for each run.

    Args:
        runs: Directories of runs.

    Raises:
        FileNotFoundError: If a directory holds no metrics.csv.
    """
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    score = score_of(runs)
    for axes, metric, label in zip(figure.subplots(1, 2), ("loss", score), ("loss", SCORES[score]), strict=True):
        for i, run in enumerate(runs):
            metrics = read_metrics(run)
            for part, style in (("train", "--"), ("val", "-")):
                points = metrics.get(f"{part}/{metric}", [])
                name = part if len(runs) == 1 else f"{run.parent.name}/{run.name} {part}"
                axes.plot([e for e, _ in points], [v for _, v in points], style, color=f"C{i}", label=name)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    return figure


def draw_convergence(panels: Mapping[str, Mapping[str, Sequence[Path]]]) -> Figure:
    """Draw the validation accuracy against the epochs trained: the mean over runs, and a band of one SD around it.

    Of runs of segmentation the mean IoU is drawn. The axis is stretched towards 100 %, where most lines end.

    Args:
        panels: For each panel, by its title, the lines by their names, each the directories of its runs. A name has
            the same style in all panels; one without runs stands only in the legend.

    Raises:
        FileNotFoundError: If a directory holds no metrics.csv.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    score = score_of([run for lines in panels.values() for runs in lines.values() for run in runs])
    figure = Figure(figsize=(4.2 * len(panels) + 1.8, 5), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    styles, handles = styles_of(names), {}
    for axes, (title, lines) in zip(grid[0], panels.items(), strict=True):
        for name, runs in lines.items():
            style = styles[name]
            epochs: dict[int, list[float]] = {}
            for run in runs:
                for epoch, accuracy in read_metrics(run).get(f"val/{score}", []):
                    epochs.setdefault(int(epoch) + 1, []).append(100 * accuracy)
            means = [statistics.mean(values) for values in epochs.values()]
            deviations = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in epochs.values()]
            low = [mean - deviation for mean, deviation in zip(means, deviations, strict=True)]
            high = [mean + deviation for mean, deviation in zip(means, deviations, strict=True)]
            (handles[name],) = axes.plot(list(epochs), means, markersize=5, **style._asdict())
            axes.fill_between(list(epochs), low, high, color=style.color, alpha=0.15, linewidth=0)
        axes.set_title(title)
        axes.set_xlabel("epochs")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel(f"validation {SCORES[score]} in % (not linear: stretched towards 100)")
    lowest = grid[0, 0].get_ylim()[0]
    grid[0, 0].set_yscale(
        "function", functions=(lambda y: -np.log(101 - np.minimum(y, 100)), lambda y: 101 - np.exp(-y))
    )
    grid[0, 0].set_yticks([0, 30, 50, 60, 70, 80, 90, 95, 98, 100])
    grid[0, 0].set_ylim(max(lowest, 0), 100)
    figure.legend(handles.values(), handles, loc="outside right center")
    return figure


def draw_scores(scores: Mapping[str, Mapping[str, Sequence[float]]], label: str) -> Figure:
    """Draw the mean score of each row against the columns of a table; the bar is the SD over the seeds.

    Args:
        scores: For each row and column the scores of the seeds in %.
        label: What they are.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    columns = list(dict.fromkeys(column for cells in scores.values() for column in cells))
    styles = styles_of(list(scores))
    for place, (row, cells) in enumerate(scores.items()):
        aside = 0.4 * ((place + 0.5) / len(scores) - 0.5)  # so that no bar covers another
        axes.errorbar(
            [columns.index(column) + aside for column in cells],
            [statistics.mean(values) for values in cells.values()],
            [statistics.stdev(values) if len(values) > 1 else 0.0 for values in cells.values()],
            capsize=3,
            markersize=5,
            label=row,
            **styles[row]._asdict(),
        )
    axes.set_xticks(range(len(columns)), columns)
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    return figure
