"""Search of a learning rate: halve it until the best has been passed, then repeat the best with seeds.

Source: Nasirigerdeh et al. (TMLR 2024), section 4.1. Unlike there, the learning rate is chosen by accuracy on
validation images, which a configuration may hold out from the training images.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from knlightning.checks import check_number


@dataclass(frozen=True)
class Trial:
    """A run of a search.

    Args:
        learning_rate: Initial learning rate.
        seed: Seed of the run.
        val: Accuracy on the validation images after the last epoch, in [0, 1].
        test: Accuracy on the test images, likewise.
        diverged: Whether the loss was no longer finite; both accuracies are 0 then.
        directory: Directory of the run.
    """

    learning_rate: float
    seed: int
    val: float
    test: float
    diverged: bool
    directory: Path


@dataclass(frozen=True)
class Search:
    """What a search has found.

    Args:
        trials: All runs: one for each learning rate with seed 0, the highest first, then the best with further seeds.
        learning_rate: The best learning rate.
        notes: What the reader of the figures must know.
    """

    trials: list[Trial]
    learning_rate: float
    notes: list[str]

    @property
    def repeats(self) -> list[Trial]:
        """The runs with the best learning rate, one for each seed."""
        return [trial for trial in self.trials if trial.learning_rate == self.learning_rate]

    @property
    def test(self) -> list[float]:
        """Test accuracies with the best learning rate in percent, one for each seed."""
        return [100 * trial.test for trial in self.repeats]

    @property
    def accuracy(self) -> str:
        """Test accuracy with the best learning rate in percent, mean ± SD over the seeds."""
        return mean_and_sd(self.test)


def mean_and_sd(values: Sequence[float]) -> str:
    """Write the mean and, of several values, the sample standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def search(
    train: Callable[[float, int], Trial],
    guessing: Callable[[Trial], float],
    start: float,
    seeds: int,
    patience: int = 1,
    max_halvings: int = 12,
    map_trials: Callable[[Callable[[tuple[float, int]], Trial], Iterable[tuple[float, int]]], Iterable[Trial]] = map,
    ahead: int = 1,
) -> Search:
    """Halve the learning rate from `start` until the best validation accuracy is passed; repeat the best with seeds.

    Of equally good learning rates the highest is the best. Runs that diverge count as accuracy 0. A learning rate with
    which the network has not learned does not count as a best that can be passed.

    Args:
        train: Trains and tests with a learning rate and a seed.
        guessing: Returns for a run the accuracy up to which a network may only have guessed.
        start: The highest learning rate.
        seeds: Number of runs with the best learning rate.
        patience: Learning rates in a row that must be worse than the best before it counts as passed.
        max_halvings: Halvings after which the search ends if the best has not been passed; 0 for no search.
        map_trials: Trains for several pairs of a learning rate and a seed, which may be side by side.
        ahead: How many learning rates are tried at a time. Those that were tried beyond the end of the search are among
            the trials, and are never the best.

    Returns:
        The runs, and the best learning rate.

    Raises:
        ArgumentError: If an argument is out of its range.
    """

    def train_all(pairs: list[tuple[float, int]]) -> list[Trial]:
        return list(map_trials(lambda pair: train(*pair), pairs))

    check_number("start", start, above=0)
    check_number("seeds", seeds, at_least=1, integer=True)
    check_number("patience", patience, at_least=1, integer=True)
    check_number("max_halvings", max_halvings, at_least=0, integer=True)
    rates = [start / 2**halvings for halvings in range(max_halvings + 1)]
    trials = train_all([(rate, 0) for rate in rates[:ahead]])
    best = trials[0]
    worse = 0
    for halvings in range(1, max_halvings + 1):
        if halvings == len(trials):
            trials += train_all([(rate, 0) for rate in rates[halvings : halvings + ahead]])
        trial = trials[halvings]
        worse = worse + 1 if trial.val < best.val and best.val > guessing(best) else 0
        if trial.val > best.val:
            best = trial
        if worse == patience:
            break
    notes = []
    if best.val <= guessing(best):
        last = trials[-1].learning_rate
        notes.append(f"No learning rate from {start:g} to {last:g} has learned more than guessing.")
    elif worse < patience and max_halvings > 0:
        notes.append(f"The best learning rate was not passed in {max_halvings} halvings: allow more, or a lower start.")
    elif best.learning_rate == start and max_halvings > 0:
        notes.append(f"The best learning rate is the first, {start:g}: a higher start may be better.")
    trials += train_all([(best.learning_rate, seed) for seed in range(1, seeds)])
    found = Search(trials, best.learning_rate, notes)
    if lost := sum(trial.diverged for trial in found.repeats):
        notes.append(f"{lost} of the {seeds} runs with the best learning rate diverged and count as accuracy 0.")
    return found


def draw_learning_rates(found: Search) -> Figure:
    """Draw validation and test accuracy against the learning rate; the bar is the SD over the seeds."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    firsts = sorted((trial for trial in found.trials if trial.seed == 0), key=lambda trial: trial.learning_rate)
    learning_rates = [trial.learning_rate for trial in firsts]
    for name, style, color in (("val", "o-", "#0072B2"), ("test", "s--", "#D55E00")):
        label = {"val": "validation", "test": "test"}[name]
        points = [100 * getattr(trial, name) for trial in firsts]
        axes.plot(learning_rates, points, style, color=color, label=f"{label}, seed 0")
    if len(found.test) > 1:
        axes.errorbar(
            [found.learning_rate],
            [statistics.mean(found.test)],
            [statistics.stdev(found.test)],
            fmt="D",
            color="black",
            capsize=5,
            label=f"test, mean and SD of {len(found.test)} seeds",
        )
    for trial in firsts:
        if trial.diverged:
            place = trial.learning_rate, 0
            axes.annotate("diverged", place, (0, 8), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(learning_rates, [f"{rate:.3g}" for rate in learning_rates], rotation=45)
    axes.margins(x=0.08)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("accuracy in %")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
