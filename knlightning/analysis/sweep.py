"""Search the learning rate of a configuration: halve it until the best is passed, then repeat the best with seeds.

    knl sweep-lr --config configs/quickstart.yaml --start 0.012 --trainer.max_epochs 4

Source: Nasirigerdeh et al. (TMLR 2024), section 4.1. Unlike there, the rate is chosen by accuracy on validation images
that are held out from the training images, unless `val_split` is 0.
"""

import csv
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure

from knlightning.analysis.command import command
from knlightning.analysis.trials import BATCH_SIZE, NORM, RATE, VAL_SPLIT, Value, record, run_trial
from knlightning.nn import Norm
from knlightning.run_directory import ROOT, replacing

DIVERGED = {"val": 0.0, "test": 0.0, "diverged": 1.0}
"""Stands for the accuracies of a run whose loss was no longer finite."""
BY_TEST = (
    "ATTENTION: --val_split 0. Nothing is held out: where the data bring no validation images of their own, the rate is"
    " chosen by\nthe accuracy on the test images that is reported, as in the paper. Such accuracies flatter; compare"
    " them with like ones alone."
)

say = rank_zero_only(print)


@dataclass(frozen=True)
class Trial:
    """A run of a search.

    Args:
        rate: initial learning rate.
        seed: seed of the run.
        val: accuracy on the validation images after the last epoch, in [0, 1].
        test: accuracy on the test images, likewise.
        diverged: whether the loss was no longer finite; both accuracies are 0 then.
        directory: the run's.
    """

    rate: float
    seed: int
    val: float
    test: float
    diverged: bool
    directory: Path


@dataclass(frozen=True)
class Search:
    """What a search has found.

    Args:
        trials: all runs in their order: one a rate with seed 0, then the best rate with further seeds.
        rate: the best rate.
        notes: what the reader of the figures must know.
    """

    trials: list[Trial]
    rate: float
    notes: list[str]

    @property
    def repeats(self) -> list[Trial]:
        """The runs with the best rate, one a seed."""
        return [trial for trial in self.trials if trial.rate == self.rate]

    @property
    def accuracy(self) -> str:
        """Test accuracy with the best rate in percent, mean ± SD over the seeds."""
        test = [100 * trial.test for trial in self.repeats]
        deviation = f" ± {statistics.stdev(test):.2f}" if len(test) > 1 else ""
        return f"{statistics.mean(test):.2f}{deviation}"


def search(
    config: Path,
    out: Path,
    settings: Mapping[str, Value],
    start: float,
    seeds: int,
    patience: int = 1,
    max_halvings: int = 12,
) -> Search:
    """Halve the learning rate from `start` until the best validation accuracy is passed; repeat the best with seeds.

    Of equally good rates the highest is the best. Runs that diverge count as accuracy 0. A rate with which the network
    has not learned (accuracy hardly above that of guessing) is not taken for a best that can be passed. Runs that
    an earlier search in `out` has finished are not repeated, one that it has left unfinished goes on.

    Args:
        config: configuration of a run; of segmentation, accuracies are the mean IoU.
        out: directory in which every run gets its own; also for `trials.csv`.
        settings: what differs from the configuration, by dotted names.
        start: the highest rate.
        seeds: number of runs with the best rate.
        patience: rates in a row that have to be worse than the best before it counts as passed.
        max_halvings: halvings after which the search ends if the best has not been passed.

    Raises:
        ValueError: An argument is out of its range, or `out` holds runs of other settings.
    """
    for name, value, least in (("seeds", seeds, 1), ("patience", patience, 1), ("max_halvings", max_halvings, 0)):
        if value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if not start > 0:
        raise ValueError(f"--start must be above 0, got {start}")
    trials: list[Trial] = []

    def run(rate: float, seed: int) -> Trial:
        directory = out / f"rate{rate:g}-seed{seed}"
        all_settings = {"seed_everything": seed, **settings, RATE: rate}
        try:
            result = run_trial(directory, config, all_settings)
        except FloatingPointError as error:
            say(error)
            result = DIVERGED
            record(directory, config, all_settings, result)
        trial = Trial(rate, seed, result["val"], result["test"], "diverged" in result, directory)
        trials.append(trial)
        write_csv(out / "trials.csv", [asdict(trial) for trial in trials])  # after each: what is done is not lost
        say(f"{directory}: {'diverged' if trial.diverged else f'validation {trial.val:.2%}, test {trial.test:.2%}'}")
        return trial

    best = run(start, 0)
    worse = 0
    for halvings in range(1, max_halvings + 1):
        trial = run(start / 2**halvings, 0)
        worse = worse + 1 if trial.val < best.val and best.val > _guessing(best.directory) else 0
        if trial.val > best.val:
            best = trial
        if worse == patience:
            break
    notes = []
    if best.val <= _guessing(best.directory):
        notes.append(f"No rate from {start:g} to {trials[-1].rate:g} has learned more than guessing.")
    elif worse < patience and max_halvings > 0:
        notes.append(f"The best rate was not passed in {max_halvings} halvings: allow more, or a lower --start.")
    elif best.rate == start and max_halvings > 0:
        notes.append(f"The best rate is the first, {start:g}: a higher --start may be better.")
    for seed in range(1, seeds):
        run(best.rate, seed)
    found = Search(trials, best.rate, notes)
    if lost := sum(trial.diverged for trial in found.repeats):
        notes.append(f"{lost} of the {seeds} runs with the best rate diverged and count as accuracy 0.")
    return found


@rank_zero_only
def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a table, in the process of rank zero alone.

    Args:
        path: the file.
        rows: at least one, all with the same keys.
    """
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def draw_rates(found: Search) -> Figure:
    """Draw validation and test accuracy against the learning rate; the bar is the SD over the seeds."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    firsts = sorted((trial for trial in found.trials if trial.seed == 0), key=lambda trial: trial.rate)
    for name, style, color in (("val", "o-", "#0072B2"), ("test", "s--", "#D55E00")):
        label = {"val": "validation", "test": "test"}[name]
        points = [100 * getattr(trial, name) for trial in firsts]
        axes.plot([trial.rate for trial in firsts], points, style, color=color, label=f"{label}, seed 0")
    test = [100 * trial.test for trial in found.repeats]
    if len(test) > 1:
        axes.errorbar(
            [found.rate],
            [statistics.mean(test)],
            [statistics.stdev(test)],
            fmt="D",
            color="black",
            capsize=5,
            label=f"test, mean and SD of {len(test)} seeds",
        )
    for trial in firsts:
        if trial.diverged:
            axes.annotate("diverged", (trial.rate, 0), (0, 8), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks([trial.rate for trial in firsts], [f"{trial.rate:.3g}" for trial in firsts], rotation=45)
    axes.margins(x=0.08)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("accuracy in %")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def sweep_lr(
    config: Path,
    start: float = 0.2,
    seeds: int = 3,
    batch_size: int | None = None,
    norm: Norm | None = None,
    val_split: float | None = 0.1,
    patience: int = 1,
    max_halvings: int = 12,
    out: Path | None = None,
    overrides: Mapping[str, str] | None = None,
) -> Search:
    """Find the learning rate of a configuration, and its accuracy over several seeds; a search that was ended goes on.

    The rate is halved from --start until the best accuracy on the validation images is passed; the best is repeated
    with several seeds. What counts is the accuracy after the last epoch. Any option of knl fit with a dot in its name,
    such as --trainer.max_epochs 5, holds for all runs.

    Args:
        config: configuration file of a run; of segmentation, accuracies are the mean IoU.
        start: the highest learning rate.
        seeds: number of runs with the best rate, the one of the search among them.
        batch_size: training images in a batch; null for the configuration's.
        norm: normalization, for backbones that have an argument of this name; null for the configuration's.
        val_split: share of the training images that is held out, for choosing the rate; 0 for the protocol of the
            paper, which chooses by the test images; null for the configuration's.
        patience: rates in a row that have to be worse than the best before the search ends.
        max_halvings: halvings after which it ends in any case.
        out: directory of the runs, trials.csv and rates.png; null for one in runs/sweep-lr named after the
            configuration, normalization and batch size.
        overrides: values of the configuration by dotted names, for all runs.

    Raises:
        ValueError: An argument is out of its range, or `out` holds runs of other settings.
    """
    given: dict[str, Value | None] = {NORM: norm, BATCH_SIZE: batch_size, VAL_SPLIT: val_split}
    settings: dict[str, Value] = {"trainer.enable_model_summary": "false"}
    settings |= {key: value for key, value in given.items() if value is not None}
    settings = with_overrides(settings, overrides or {})
    if out is None:
        size = batch_size and f"batch{batch_size}"
        out = ROOT / "sweep-lr" / "-".join(str(part) for part in (config.stem, norm, size) if part)
    if val_split == 0:
        say(BY_TEST)
    found = search(config, out, settings, start, seeds, patience, max_halvings)
    say("\n| learning rate | seed | validation | test |\n| --- | --- | --- | --- |")
    for trial in found.trials:
        accuracies = "diverged | diverged" if trial.diverged else f"{100 * trial.val:.2f} | {100 * trial.test:.2f}"
        say(f"| {trial.rate:g} | {trial.seed} | {accuracies} |")
    say(f"\nBest learning rate: {found.rate:g}")
    say(f"Test accuracy:      {found.accuracy} % ({'mean ± SD of ' if seeds > 1 else ''}{seeds} seeds)")
    for note in [*found.notes, *([BY_TEST] if val_split == 0 else [])]:
        say(note)
    save_figure(draw_rates(found), out / "rates.png")
    say(f"Written: {out}/trials.csv, rates.png")
    return found


@rank_zero_only
def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG file, in the process of rank zero alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def with_overrides(settings: Mapping[str, Value], overrides: Mapping[str, str]) -> dict[str, Value]:
    """Add values of the configuration to those that a command settles itself.

    Args:
        settings: what the command settles; the learning rate is understood to be among it.
        overrides: what is to be added, by dotted names; `.init_args` may be left out as on the command line.

    Raises:
        ValueError: A value that the command settles is to be overridden.
    """
    settled = {_short(key): key for key in (*settings, RATE)}
    for key in overrides:
        if _short(key) in settled:
            raise ValueError(f"--{key} is settled by this command for each run: use the command's own arguments")
    return {**settings, **overrides}


def _short(key: str) -> str:
    return key.replace(".init_args", "")


def _guessing(run: Path) -> float:
    """Return the accuracy up to which a network may only have guessed; 0 if the number of classes is not known."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    backbone = config["model"]["init_args"]["backbone"]
    classes = backbone.get("init_args", {}).get("num_classes")
    return min(3 / classes, 1 / classes + 0.15) if classes else 0.0


def main(args: list[str] | None = None) -> None:
    """Run `knl sweep-lr` with the arguments of a command line, those of the process if None."""
    command(sweep_lr, "knl sweep-lr", args)


if __name__ == "__main__":
    main()
