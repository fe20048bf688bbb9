"""Draw the curves of runs from the `metrics.csv` in their directories.

python -m knlightning.analysis.curves --runs '[runs/quickstart/0]' --out curves.png
"""

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from knlightning.analysis.command import command

STYLES = (
    ("#000000", "o", "-"),
    ("#E69F00", "s", "-"),
    ("#56B4E9", "^", "-"),
    ("#009E73", "v", "-"),
    ("#0072B2", "D", "-"),
    ("#D55E00", "P", "-"),
    ("#CC79A7", "X", "-"),
    ("#999999", "<", "--"),
    ("#882255", "*", "--"),
)
"""Colours that the colour-blind tell apart (Okabe and Ito 2008, but for the last two), markers and lines."""


HEADLINES = {"acc": "accuracy", "miou": "mean IoU"}
"""What is drawn of runs of classification, and of segmentation."""


def read_metrics(run: Path) -> dict[str, list[tuple[float, float]]]:
    """Read the metrics of a run by epoch.

    Args:
        run: directory of the run.

    Returns:
        For each metric its (epoch, value) in the order of training.

    Raises:
        FileNotFoundError: if the directory holds no metrics.csv.
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


def headline(runs: Sequence[Path]) -> str:
    """Return the metric of `HEADLINES` that runs have; "acc" if none."""
    found = [name for run in runs for name in HEADLINES if f"val/{name}" in read_metrics(run)]
    return found[0] if found else "acc"


def draw_curves(runs: list[Path]) -> Figure:
    """Draw loss and accuracy (or mean IoU) of training (dashed) and validation (solid), one colour a run.

    Raises:
        FileNotFoundError: if a directory holds no metrics.csv.
    """
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    name = headline(runs)
    for axes, metric, label in zip(figure.subplots(1, 2), ("loss", name), ("loss", HEADLINES[name]), strict=True):
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

    Of runs of segmentation it is the mean IoU that is drawn. The axis is stretched towards 100 %, where most lines end.

    Args:
        panels: for each panel, by its title, the lines by their names, each the directories of its runs. A name has
            the same style in all panels; one without runs stands in the legend alone.

    Raises:
        FileNotFoundError: if a directory holds no metrics.csv.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    metric = headline([run for lines in panels.values() for runs in lines.values() for run in runs])
    figure = Figure(figsize=(4.2 * len(panels) + 1.8, 5), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    handles = {}
    for axes, (title, lines) in zip(grid[0], panels.items(), strict=True):
        for name, runs in lines.items():
            color, marker, style = STYLES[names.index(name) % len(STYLES)]
            epochs: dict[int, list[float]] = {}
            for run in runs:
                for epoch, accuracy in read_metrics(run).get(f"val/{metric}", []):
                    epochs.setdefault(int(epoch) + 1, []).append(100 * accuracy)
            means = [statistics.mean(values) for values in epochs.values()]
            deviations = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in epochs.values()]
            low = [mean - deviation for mean, deviation in zip(means, deviations, strict=True)]
            high = [mean + deviation for mean, deviation in zip(means, deviations, strict=True)]
            (handles[name],) = axes.plot(list(epochs), means, style, color=color, marker=marker, markersize=5)
            axes.fill_between(list(epochs), low, high, color=color, alpha=0.15, linewidth=0)
        axes.set_title(title)
        axes.set_xlabel("epochs")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel(f"validation {HEADLINES[metric]} in %")
    lowest = grid[0, 0].get_ylim()[0]
    grid[0, 0].set_yscale(
        "function", functions=(lambda y: -np.log(101 - np.minimum(y, 100)), lambda y: 101 - np.exp(-y))
    )
    grid[0, 0].set_yticks([0, 30, 50, 60, 70, 80, 90, 95, 98, 100])
    grid[0, 0].set_ylim(max(lowest, 0), 100)
    figure.legend(handles.values(), handles, loc="outside right center")
    return figure


def curves(runs: list[Path], out: Path = Path("curves.png")) -> None:
    """Draw the curves of runs into a PNG file.

    Args:
        runs: directories of runs.
        out: the file.

    Raises:
        FileNotFoundError: if a directory holds no metrics.csv.
    """
    figure = draw_curves(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    print(out)


def main(args: list[str] | None = None) -> None:
    """Draw with the arguments of a command line, those of the process if None."""
    command(curves, "python -m knlightning.analysis.curves", args)


if __name__ == "__main__":
    main()
