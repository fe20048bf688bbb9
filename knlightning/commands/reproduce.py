"""Train and measure for the tables and figures of the paper, or list them.

knl reproduce --table 1 --backbone knresnet18 --norm kernel --batch_size 2
knl reproduce --all --scale tiny
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal

from knlightning.analysis.paper import ROWS, TITLES, Row, Scale, Table
from knlightning.checks import ArgumentError, check_number
from knlightning.commands.command import command
from knlightning.commands.output import say
from knlightning.commands.reproduction import Reproduction

INTRODUCTION = """\
# Results of the paper, and their commands

Each row is a command. It trains with the row's network, normalization, batch size and learning rate, three runs with
seeds 0, 1 and 2, and tests each after its last epoch. Mean and standard deviation stand beside the published ones in
`report.html` and `report.md`, which are written anew after each run. The command may be interrupted and started again:
a run that is done is not repeated, and one that is not goes on where it was.

    knl reproduce --table 1 --backbone knresnet18 --norm kernel --batch_size 2

Tables 5 to 8 and the figures have commands too, `knl reproduce --table 5` to `--table 8`, `--figure 4` and
`--figure 7`, and `knl reproduce --all` does everything.

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
    table: Literal[Table, "5", "6", "7", "8"] | None = None,
    figure: Literal["4", "7"] | None = None,
    ablation: bool = False,
    all: bool = False,
    backbone: str | None = None,
    norm: str | None = None,
    batch_size: int | None = None,
    scale: Scale = "paper",
    seeds: int | None = None,
    out: Path | None = None,
    parallel: int = 1,
    cluster: str | None = None,
    overrides: Mapping[str, str] | None = None,
) -> None:
    """Train and measure for tables and figures of the paper, and report the results beside the published ones.

    After each result OUT/report.html and report.md are written, with all that was found so far. Without a choice, list
    the rows of the tables with their commands.

    Args:
        table: A table of the paper, or "convnext", "cifar10" or "ablation" of its text.
        figure: 4 for convergence, 7 for the loss landscape.
        ablation: The same as --table ablation.
        all: Everything; what lacks its data is left out, and told.
        backbone: The network, of Tables 1 to 5.
        norm: The normalization, likewise.
        batch_size: Images in a step of the optimizer, on all devices together, likewise.
        scale: "tiny" does the same in minutes with small networks and the digits of scikit-learn, which shows that it
            works, and says nothing of the paper.
        seeds: Number of runs for each row, with seeds 0, 1, ...; null for 3, and 2 for tiny.
        out: Directory of the runs, results.csv and the report; what it holds already is not repeated. Null for
            runs/reproduce, and runs/reproduce_tiny.
        parallel: How many runs go on at a time, side by side on Ray if above 1; each gets its share of the processors,
            and of the GPUs, of one at most.
        cluster: Address of a Ray cluster, all nodes of which see the same files; null for this machine alone.
        overrides: Values of the configuration by dotted names, for all runs.

    Raises:
        ValueError: If there is no such row, or an argument is out of its range.
        FileNotFoundError: If the working directory has no configuration files.
    """
    check_number("seeds", seeds, at_least=1, integer=True, none="3, or 2 for tiny")
    table = "ablation" if ablation else table
    limits = (backbone, norm, batch_size)
    if not (table or figure or all or any(limits)):
        say(page().removesuffix("\n"))
        return
    choose(table if table in TITLES else None, *limits)
    run = Reproduction(scale, seeds, out, overrides or {}, choose(None, *limits), parallel, cluster)
    parts: dict[str, Callable[[], None]] = {
        **{key: partial(run.scores, key) for key in TITLES},
        "5": run.learning_rates,
        "6": run.network_costs,
        "7": run.network_costs,
        "8": run.layer_costs,
        "figure 4": run.convergence,
        "figure 7": run.landscape,
    }
    wanted = [key for key in (table, figure and f"figure {figure}") if key] or list(TITLES)
    with run.trials:
        for key in parts if all else wanted:
            try:
                parts[key]()
            except FileNotFoundError as error:
                if not all:
                    raise
                say(f"{key} is left out: {error}")
    say(f"Written: {run.out}/report.html, report.md")


def main(args: list[str]) -> None:
    """Run `knl reproduce`; `args` is the command line after it."""
    command(reproduce, "knl reproduce", [f"{arg}=true" if arg in ("--all", "--ablation") else arg for arg in args])
