"""Pictures of runs, from the `metrics.csv` in their directories, and of comparisons."""

import csv
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from knlightning.checks import check

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


XAxis = Literal["epochs", "steps", "hours"]
"""What curves are drawn against; hours are those of training alone, without validation."""
SCORES = {"acc": "accuracy", "miou": "mean IoU"}
"""The score of runs of classification, and of segmentation, with its name."""


def read_metrics(run: Path) -> dict[str, list[tuple[float, float]]]:
    """Read the metrics of a run by epoch.

    Args:
        run: Directory of the run.

    Returns:
        For each metric, and for "step", its (epoch, value) in the order of training.

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
                if value and row.get("epoch") and name != "epoch":
                    metrics.setdefault(name, []).append((float(row["epoch"]), float(value)))
    return metrics


def mean_curve(runs: Sequence[Path], metric: str, x: XAxis = "epochs") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a metric over the training, of several runs.

    Args:
        runs: Directories of runs.
        metric: Its name, such as "val/acc".
        x: What the metric is drawn against.

    Returns:
        For each epoch that a run has ended, the mean over the runs of epochs, steps or hours trained; the mean of the
        metric; its standard deviation, 0 of a single run.

    Raises:
        ValueError: If `x` is "hours", and a run has not logged its time.
    """
    points: dict[float, list[tuple[float, float]]] = {}
    for run in runs:
        metrics = read_metrics(run)
        if x == "hours":
            seconds = dict(metrics.get("train/seconds", []))
            check(bool(seconds), "x", x, "epochs or steps", f"{run} has not logged its time")
            ends = dict(zip(seconds, np.cumsum(list(seconds.values())) / 3600, strict=True))
        else:
            ends = {epoch: 1 + (epoch if x == "epochs" else step) for epoch, step in metrics["step"]}
        for epoch, value in metrics.get(metric, []):
            if epoch in ends:
                points.setdefault(epoch, []).append((ends[epoch], value))
    places = np.array([statistics.mean(place for place, _ in found) for found in points.values()])
    means = np.array([statistics.mean(value for _, value in found) for found in points.values()])
    spreads = [statistics.stdev(value for _, value in found) if len(found) > 1 else 0.0 for found in points.values()]
    return places, means, np.array(spreads)


def score_of(runs: Sequence[Path]) -> str:
    """Return the score in `SCORES` that runs have.

    Args:
        runs: Directories of runs.

    Returns:
        Its name, such as "miou"; "acc" if they have none.
    """
    found = [name for run in runs for name in SCORES if f"val/{name}" in read_metrics(run)]
    return found[0] if found else "acc"


def draw_curves(runs: Sequence[Path] | Mapping[str, Sequence[Path]], x: XAxis = "epochs") -> Figure:
    """Draw loss and accuracy (or mean IoU) of training (dashed) and validation (solid), one colour for each line.

    Args:
        runs: Directories of runs, a line for each; or by the name of a line its runs, of which the mean is drawn and a
            band of one standard deviation.
        x: What is drawn against.

    Raises:
        FileNotFoundError: If a directory holds no metrics.csv.
        ValueError: If the runs have not logged their time, and hours are wanted.
    """
    lines = runs if isinstance(runs, Mapping) else {f"{run.parent.name}/{run.name}": [run] for run in runs}
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    score = score_of([run for group in lines.values() for run in group])
    for axes, metric, label in zip(figure.subplots(1, 2), ("loss", score), ("loss", SCORES[score]), strict=True):
        for i, (name, group) in enumerate(lines.items()):
            for part, style in (("train", "--"), ("val", "-")):
                places, means, spreads = mean_curve(group, f"{part}/{metric}", x)
                axes.plot(places, means, style, color=f"C{i}", label=part if len(lines) == 1 else f"{name} {part}")
                axes.fill_between(places, means - spreads, means + spreads, color=f"C{i}", alpha=0.15, linewidth=0)
        axes.set_xlabel(x)
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
            epochs, means, spreads = mean_curve(runs, f"val/{score}")
            (handles[name],) = axes.plot(epochs, 100 * means, markersize=5, **style._asdict())
            low, high = 100 * (means - spreads), 100 * (means + spreads)
            axes.fill_between(epochs, low, high, color=style.color, alpha=0.15, linewidth=0)
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
