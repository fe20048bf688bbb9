"""Search the learning rate, and repeat the best with several seeds.

knl sweep-lr --config configs/quickstart.yaml --start 0.012 --trainer.max_epochs 4
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from knlightning.analysis.search import Search, draw_learning_rates
from knlightning.analysis.settings import BATCH_SIZE, NORM, VAL_SPLIT, Value, check_overrides
from knlightning.commands.command import command
from knlightning.commands.output import save_figure, say
from knlightning.commands.trials import BY_TEST, Trials, run_search
from knlightning.nn import Norm
from knlightning.privacy.search import search_report, search_statement
from knlightning.run_directory import ROOT


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
    parallel: int = 1,
    cluster: str | None = None,
    overrides: Mapping[str, str] | None = None,
) -> Search:
    """Find the learning rate of a configuration, and its accuracy over several seeds; a search that was ended goes on.

    The learning rate is halved from --start until the best accuracy on the validation images is passed; the best is
    repeated with several seeds. What counts is the accuracy after the last epoch. Any option of knl fit with a dot in
    its name, such as --trainer.max_epochs 5, holds for all runs. Of private runs the epsilon of the whole search is
    told.

    Args:
        config: Configuration file of a run; of segmentation, accuracies are the mean IoU.
        start: The highest learning rate.
        seeds: Number of runs with the best learning rate, the one of the search among them.
        batch_size: Training images in a batch; null for the configuration's.
        norm: Normalization, for backbones that have an argument of this name; null for the configuration's.
        val_split: Share of the training images that is held out, for choosing the learning rate; 0 for the protocol of
            the paper, which chooses by the test images; null for the configuration's.
        patience: Learning rates in a row that must be worse than the best before the search ends.
        max_halvings: Halvings after which it ends in any case.
        out: Directory of the runs, trials.csv, results.csv and rates.png; null for one in runs/sweep-lr named after the
            configuration, normalization and batch size.
        parallel: How many runs go on at a time, side by side on Ray if above 1; each gets its share of the processors,
            and of the GPUs, of one at most.
        cluster: Address of a Ray cluster, all nodes of which see the same files; null for this machine alone.
        overrides: Values of the configuration by dotted names, for all runs.

    Returns:
        The runs, and the best learning rate.

    Raises:
        ValueError: If an argument is out of its range, or `out` holds runs of other settings.
    """
    given: dict[str, Value | None] = {NORM: norm, BATCH_SIZE: batch_size, VAL_SPLIT: val_split}
    settings: dict[str, Value] = {key: value for key, value in given.items() if value is not None}
    check_overrides(overrides or {}, settings)
    settings |= overrides or {}
    if out is None:
        size = batch_size and f"batch{batch_size}"
        out = ROOT / "sweep-lr" / "-".join(str(part) for part in (config.stem, norm, size) if part)
    if val_split == 0:
        say(BY_TEST)
    with Trials(out, parallel, cluster) as trials:
        found = run_search(trials, config, out, settings, start, seeds, patience, max_halvings, ahead=parallel)
    say(f"\nBest learning rate: {found.learning_rate:g}")
    say(f"Test accuracy:      {found.accuracy} % ({'mean ± SD of ' if seeds > 1 else ''}{seeds} seeds)")
    for note in [*found.notes, *([BY_TEST] if val_split == 0 else [])]:
        say(note)
    if report := search_report([trial.directory for trial in found.trials]):
        say(f"Privacy of the whole search: {search_statement(report)}")
        say("The epsilon of a single run is not all: the learning rate was chosen by all of them.")
    save_figure(draw_learning_rates(found), out / "rates.png")
    say(f"Written: {out}/trials.csv, rates.png")
    return found


main = partial(command, sweep_lr, "knl sweep-lr")
