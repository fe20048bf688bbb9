r"""Compare networks, normalizations, batch sizes, privacy budgets or other settings: a table and pictures.

    knl compare --config experiments/compare_digits.yaml
    knl compare --settings '{config: configs/digits_resnet8.yaml, model.optimizer.lr: 0.1, data.scaling: unit}' \
        --rows '{batch: {model.backbone.norm: batch}, kernel: {model.backbone.norm: kernel}}' \
        --columns '{batch size 8: {data.batch_size: 8}, batch size 32: {data.batch_size: 32}}'

Each cell of the table is a configuration. Its learning rate is searched, and the best is repeated with several seeds,
as `knl sweep-lr` does.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

from knlightning.analysis.curves import SCORES, draw_convergence, draw_scores, score_of
from knlightning.analysis.grid import Cell, format_table, list_cells
from knlightning.analysis.search import Search
from knlightning.analysis.settings import LEARNING_RATE, VAL_SPLIT, Value, check_overrides, short
from knlightning.commands.command import command
from knlightning.commands.output import save_figure, say, write_csv, write_text
from knlightning.commands.trials import BY_TEST, Trials, run_search
from knlightning.run_directory import ROOT


def compare(
    rows: dict[str, dict[str, Value | list[Value]]],
    columns: dict[str, dict[str, Value]],
    settings: dict[str, Value | list[Value]],
    seeds: int = 3,
    patience: int = 1,
    max_halvings: int = 12,
    only: list[str] | None = None,
    out: Path = ROOT / "compare",
    parallel: int = 1,
    cluster: str | None = None,
    overrides: Mapping[str, str] | None = None,
) -> dict[Cell, Search]:
    """Compare settings; print a table of test accuracies, and draw them and the convergence.

    Settings are options of knl fit, by their dotted names; `config` is the configuration file of a run. Those of a row
    take precedence over those of its column, and these over the common ones. A list has one value for each column. The
    learning rate (model.optimizer.lr) is the highest of the search; with --max_halvings 0 it is used as it is. Runs
    that are done are not repeated, so that a comparison that was ended goes on. Any option of knl fit with a dot in its
    name, such as --trainer.limit_train_batches 10, holds for all runs.

    Args:
        rows: Settings of each row of the table, by its label.
        columns: Settings of each column, by its label.
        settings: Settings of all runs.
        seeds: Number of runs with the best learning rate, the one of the search among them.
        patience: Learning rates in a row that must be worse than the best before a search ends.
        max_halvings: Halvings after which it ends in any case; 0 for no search.
        only: Labels of rows and columns to which the comparison is limited; null for all.
        out: Directory of the runs, results.csv, compare.csv (all runs), compare.md (the table), accuracy.png and
            convergence.png.
        parallel: How many runs go on at a time, side by side on Ray if above 1; each gets its share of the processors,
            and of the GPUs, of one at most.
        cluster: Address of a Ray cluster, all nodes of which see the same files; null for this machine alone.
        overrides: Values of the configuration by dotted names, for all runs.

    Returns:
        What was found, by the labels of row and column. Of segmentation, accuracies are the mean IoU.

    Raises:
        ValueError: If an argument is out of its range, or `out` holds runs of other settings.
    """
    overrides = overrides or {}
    check_overrides(overrides, [key for settled in (rows, columns) for part in settled.values() for key in part])
    cells = list_cells(rows, columns, {**settings, **overrides}, only or ())
    searches: dict[Cell, Search] = {}

    def search(number: int, cell: Cell) -> Search:
        given = dict(cells[cell])
        config, start = Path(str(given.pop("config"))), float(given.pop(short(LEARNING_RATE)))
        directory = out / "-".join(re.sub(r"[^\w.]+", "-", label) for label in cell)
        title = f"{', '.join(cell)} ({number} of {len(cells)})\n"
        ahead = max(1, parallel // len(cells))
        return run_search(trials, config, directory, given, start, seeds, patience, max_halvings, title, ahead)

    with Trials(out, parallel, cluster) as trials:
        for cell, found in zip(cells, trials.map(lambda item: search(*item), enumerate(cells, 1)), strict=True):
            searches[cell] = found
            _write(searches, out, max_halvings > 0)
    say(f"\nTest accuracy (segmentation: mean IoU) in %{', mean ± SD of' if seeds > 1 else ','} {seeds} seeds\n")
    say(format_table(searches, max_halvings > 0))
    for cell, found in searches.items():
        for note in found.notes:
            say(f"{', '.join(cell)}: {note}")
    if any(str(given.get(short(VAL_SPLIT))) in ("0", "0.0") for given in cells.values()):
        say(BY_TEST)
    say(f"Written: {out}/compare.csv, compare.md, accuracy.png, convergence.png")
    return searches


def _write(searches: Mapping[Cell, Search], out: Path, searched: bool) -> None:
    """Write what has been found so far."""
    write_csv(
        out / "compare.csv",
        [
            {"row": row, "column": column, "best": trial.learning_rate == found.learning_rate, **asdict(trial)}
            for (row, column), found in searches.items()
            for trial in found.trials
        ],
    )
    write_text(out / "compare.md", format_table(searches, searched))
    accuracies: dict[str, dict[str, list[float]]] = {}
    runs: dict[str, dict[str, list[Path]]] = {}
    for (row, column), found in searches.items():
        accuracies.setdefault(row, {})[column] = found.test
        runs.setdefault(column, {})[row] = [trial.directory for trial in found.repeats if not trial.diverged]
    score = SCORES[score_of([run for of_rows in runs.values() for of_row in of_rows.values() for run in of_row])]
    save_figure(draw_scores(accuracies, f"test {score} in %"), out / "accuracy.png")
    save_figure(draw_convergence(runs), out / "convergence.png")


main = partial(command, compare, "knl compare")
