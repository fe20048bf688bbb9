"""Compare normalizations under differential privacy: test accuracy against epsilon, a table and a plot.

Table 4 of Nasirigerdeh et al. (TMLR 2024) in miniature: handwritten digits, a ResNet-8 with each normalization that can
be private, and a KNResNet-8.

    python -m knlightning.analysis.private_digits
"""

import statistics
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from knlightning.analysis.command import command
from knlightning.analysis.curves import STYLES
from knlightning.analysis.sweep import save_figure, say, with_overrides, write_csv
from knlightning.analysis.trials import NORM, RATE, Value, run_trial
from knlightning.nn import Norm
from knlightning.run_directory import ROOT

EPSILON = "trainer.callbacks.target_epsilon"
RATES: dict[str, dict[Norm, float]] = {
    "resnet8": {"kernel": 0.25, "group": 0.0625, "layer": 0.0625, "none": 0.0625},
    "knresnet8": {"kernel": 0.25},
}
"""The best of a few, by the accuracy on a fifth of the training images that was held out, at epsilon 4."""

Accuracies = Mapping[tuple[str, Norm, float], list[float]]
"""Test accuracies in % of the seeds, by network, normalization and epsilon."""


def private_digits(
    config: Path = Path("configs/digits_dp.yaml"),
    rates: dict[str, dict[Norm, float]] | None = None,
    epsilons: tuple[float, ...] = (8.0, 4.0, 2.0, 1.0),
    epochs: int = 6,
    seeds: int = 3,
    out: Path = ROOT / "private_digits",
    overrides: Mapping[str, str] | None = None,
) -> dict[tuple[str, Norm, float], list[float]]:
    """Train privately with each normalization at several budgets; print a table of test accuracies, and draw them.

    Kernel normalized networks take images divided by 255, all others images with zero mean and unit variance. Runs that
    are done are not repeated, so that a comparison that was ended goes on. Any option of knl fit with a dot in its
    name, such as --trainer.callbacks.max_grad_norm 0.5, holds for all runs.

    Args:
        config: configuration file of a private classification run.
        rates: functions of knlightning.models, each with its normalizations and their learning rates; null for RATES.
        epsilons: the budgets.
        epochs: epochs of a run.
        seeds: number of runs for each; sampling and noise are secret in all of them.
        out: directory of the runs, private_digits.csv and private_digits.png.
        overrides: values of the configuration by dotted names, for all runs.

    Returns:
        What was found.

    Raises:
        ValueError: An argument is out of its range, or `out` holds runs of other settings.
    """
    if seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {seeds}")
    found: dict[tuple[str, Norm, float], list[float]] = {}
    for epsilon in epsilons:
        for network, norms in (rates or RATES).items():
            for norm, rate in norms.items():
                settings: dict[str, Value] = {
                    "model.init_args.backbone": f"knlightning.models.{network}",
                    NORM: norm,
                    RATE: rate,
                    EPSILON: epsilon,
                    "data.init_args.scaling": "unit" if norm == "kernel" else "standard",
                    "pictures.every_n_epochs": 0,
                    "trainer.max_epochs": epochs,
                    "trainer.enable_progress_bar": "false",
                    "trainer.enable_model_summary": "false",
                }
                settings = with_overrides(settings, overrides or {})
                for seed in range(seeds):
                    directory = out / f"{network}-{norm}-epsilon{epsilon:g}-seed{seed}"
                    accuracy = run_trial(directory, config, settings | {"seed_everything": seed})["test"]
                    found.setdefault((network, norm, epsilon), []).append(100 * accuracy)
                    _write(found, out)
    say(f"\nTest accuracy in %{', mean ± SD of' if seeds > 1 else ','} {seeds} seeds\n")
    say(table(found))
    say(f"\nWritten: {out}/private_digits.csv, private_digits.png")
    return found


def table(found: Accuracies) -> str:
    """Return a table in Markdown: a row a network, a column a budget."""
    epsilons = list(dict.fromkeys(epsilon for _, _, epsilon in found))
    lines = ["| network | normalization |" + "".join(f" ε = {epsilon:g} |" for epsilon in epsilons)]
    lines.append("| --- | --- |" + " --- |" * len(epsilons))
    for network, norm in dict.fromkeys((network, norm) for network, norm, _ in found):
        cells = (found.get((network, norm, epsilon)) for epsilon in epsilons)
        lines.append(f"| {network} | {norm} |" + "".join(f" {_cell(cell)} |" for cell in cells))
    return "\n".join(lines)


def draw(found: Accuracies) -> Figure:
    """Draw the accuracy against the budget; the bar is the SD over the seeds."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    lines = dict.fromkeys((network, norm) for network, norm, _ in found)
    for (network, norm), (colour, marker, line) in zip(lines, STYLES, strict=False):
        points = [(key[2], values) for key, values in found.items() if key[:2] == (network, norm)]
        axes.errorbar(
            [epsilon for epsilon, _ in points],
            [statistics.mean(values) for _, values in points],
            [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points],
            color=colour, marker=marker, linestyle=line, capsize=3, label=f"{network}, {norm}",
        )  # fmt: skip
    epsilons = sorted({epsilon for _, _, epsilon in found})
    axes.set_xscale("log", base=2)
    axes.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
    axes.set(xlabel="ε (a smaller one is more private)", ylabel="test accuracy in %")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _cell(values: list[float] | None) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def _write(found: Accuracies, out: Path) -> None:
    """Write what has been found so far."""
    rows = [
        {"network": network, "norm": norm, "epsilon": epsilon, "seed": seed, "test": value}
        for (network, norm, epsilon), values in found.items()
        for seed, value in enumerate(values)
    ]
    write_csv(out / "private_digits.csv", rows)
    save_figure(draw(found), out / "private_digits.png")


def main(args: list[str] | None = None) -> None:
    """Run the comparison with the arguments of a command line, those of the process if None."""
    command(private_digits, "python -m knlightning.analysis.private_digits", args)


if __name__ == "__main__":
    main()
