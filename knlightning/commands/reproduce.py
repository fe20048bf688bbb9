"""List the results of the paper, or train for them again.

knl reproduce --table 1 --backbone knresnet18 --norm kernel --batch_size 2
"""

from collections.abc import Iterator, Mapping
from itertools import groupby, islice
from pathlib import Path

from knlightning.analysis.paper import ROWS, TITLES, Row, Table
from knlightning.analysis.search import mean_and_sd
from knlightning.checks import ArgumentError, check_number
from knlightning.commands.command import command
from knlightning.commands.output import say
from knlightning.commands.trials import FURTHER, Trials

INTRODUCTION = """\
# Results of the paper, and their commands

Each row is a command. It trains with the row's network, normalization, batch size and learning rate, three runs with
seeds 0, 1 and 2, tests each after its last epoch, and prints mean and standard deviation beside the published ones. It
may be interrupted and started again: a run that is done is not repeated, and one that is not goes on where it was.

    knl reproduce --table 1 --backbone knresnet18 --norm kernel --batch_size 2

Fewer choices make more rows: `knl reproduce --table 1` is the whole of Table 1, one run after the other, and with
`--parallel 4` four [side by side](guides/clusters.md#runs-side-by-side). Whatever `knl fit` accepts by a name with a
dot is passed on to each run, such as `--data.root DIRECTORY`, `--data.download true` (CIFAR),
`--trainer.precision bf16-mixed`, `--trainer.max_epochs 1`. The runs lie in `runs/reproduce`, or where `--out` says.

Accuracies are in %, batch sizes those of all devices together. On ImageNet one device takes the batches that the paper
spreads over eight (ConvNeXt: four; Cityscapes: two), and adds their gradients; with eight, set `--trainer.devices 8
--trainer.accumulate_grad_batches 1`. On Cityscapes batch normalization then takes the statistics of all devices, as in
the paper, with `--model.backbone.norm sync_batch`.

This page is written by `knl reproduce > docs/reproduce.md`.
"""


def choose(
    table: Table | None = None, backbone: str | None = None, norm: str | None = None, batch_size: int | None = None
) -> list[Row]:
    """Return the rows with the given properties; None for any.

    Args:
        table: Where the paper reports the results.
        backbone: The network.
        norm: The normalization.
        batch_size: Images in a step of the optimizer.

    Raises:
        ArgumentError: If there are none; says what there is.
    """
    rows = list(ROWS)
    for name, value in {"table": table, "backbone": backbone, "norm": norm, "batch_size": batch_size}.items():
        if value is not None:
            left = [row for row in rows if getattr(row, name) == value]
            if not left:
                there = ", ".join(dict.fromkeys(str(getattr(row, name)) for row in rows))
                raise ArgumentError(name, value, f"one of {there}", "The paper has no such row among those chosen")
            rows = left
    return rows


def page() -> str:
    """Write the rows with their commands, in Markdown."""
    return "\n".join([INTRODUCTION, *_sections()])


def _sections() -> Iterator[str]:
    for table, rows in groupby(ROWS, key=lambda row: row.table):
        yield f"## {TITLES[table]}\n"
        yield "| backbone | norm | batch size | learning rate | published | command |"
        yield "| --- | --- | --- | --- | --- | --- |"
        for row in rows:
            yield (
                f"| {row.backbone} | {row.norm} | {row.batch_size} | {row.learning_rate:.10g} | {row.published} |"
                f" `{row.command}` |"
            )
        yield ""


def reproduce(
    table: Table | None = None,
    backbone: str | None = None,
    norm: str | None = None,
    batch_size: int | None = None,
    seeds: int = 3,
    out: Path = Path("runs/reproduce"),
    parallel: int = 1,
    cluster: str | None = None,
    overrides: Mapping[str, str] | None = None,
) -> None:
    """Train for rows of the paper's tables, and print accuracies beside the published ones.

    Without a choice of rows, list all of them with their commands.

    Args:
        table: Where the paper reports the results.
        backbone: The network.
        norm: The normalization.
        batch_size: Images in a step of the optimizer, on all devices together.
        seeds: Number of runs for each row, with seeds 0, 1, ...
        out: Directory of the runs and results.csv; what it holds already is not repeated.
        parallel: How many runs go on at a time, side by side on Ray if above 1; each gets its share of the processors,
            and of the GPUs, of one at most.
        cluster: Address of a Ray cluster, all nodes of which see the same files; null for this machine alone.
        overrides: Values of the configuration by dotted names, for all runs.

    Raises:
        ValueError: If there is no such row, or an argument is out of its range.
        FileNotFoundError: If the working directory has no configuration files.
    """
    check_number("seeds", seeds, at_least=1, integer=True)
    if (table, backbone, norm, batch_size) == (None, None, None, None):
        say(page().removesuffix("\n"))
        return
    rows = choose(table, backbone, norm, batch_size)
    for row in rows:
        if not row.path.is_file():
            raise FileNotFoundError(f"no {row.path} in {Path.cwd()}: start in the directory of the project")
    say(f"\nTest accuracy in %, mean ± SD of {seeds} runs\n")
    say("| backbone | norm | batch size | published | reproduced |\n| --- | --- | --- | --- | --- |")
    pairs = [(row, seed) for row in rows for seed in range(seeds)]
    with Trials(out, parallel, cluster) as trials:
        reached = trials.map(lambda pair: _run(trials, *pair, out, overrides or {}), pairs)
        for row in rows:
            runs = list(islice(reached, seeds))
            say(f"| {row.backbone} | {row.norm} | {row.batch_size} | {row.published} | {_summary(runs)} |")


def _run(trials: Trials, row: Row, seed: int, out: Path, overrides: Mapping[str, str]) -> list[float]:
    """Return what a run has reached on the test images in %: what is published of the row, in the same order."""
    changes = {**row.settings, "seed_everything": seed, **overrides}
    reached = trials.run(out / row.name / f"seed{seed}", row.path, changes)
    return [100 * reached[name] for name in ("test", *FURTHER[: len(row.further)])]


def _summary(runs: list[list[float]]) -> str:
    return " / ".join(mean_and_sd(values) for values in zip(*runs, strict=True))


def main(args: list[str]) -> None:
    """Run `knl reproduce`.

    Args:
        args: Command line after `reproduce`.
    """
    command(reproduce, "knl reproduce", args)
