"""Draw the curves of runs from the `metrics.csv` in their directories.

python -m knlightning.analysis.curves --runs '[runs/quickstart/0]' --out curves.png
"""

import csv
from pathlib import Path

from jsonargparse import auto_cli
from matplotlib.figure import Figure


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


def draw_curves(runs: list[Path]) -> Figure:
    """Draw loss and accuracy of training (dashed) and validation (solid), one colour a run.

    Raises:
        FileNotFoundError: if a directory holds no metrics.csv.
    """
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, metric, label in zip(figure.subplots(1, 2), ("loss", "acc"), ("loss", "accuracy"), strict=True):
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


if __name__ == "__main__":
    auto_cli(curves, as_positional=False)
