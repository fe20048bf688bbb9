"""The parts of the paper that `knl reproduce` trains or measures, and their report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from knlightning.analysis.benchmark import Preset, machine
from knlightning.analysis.curves import draw_convergence
from knlightning.analysis.measure import choose_device
from knlightning.analysis.paper import START, TITLES, Row, Scale, Table, rows_of, tiny
from knlightning.analysis.paper_report import (
    Finding,
    compare_convergence,
    compare_landscapes,
    compare_layer_costs,
    compare_learning_rates,
    compare_network_costs,
    compare_scores,
    labels_of,
    write_html,
    write_markdown,
)
from knlightning.analysis.search import mean_and_sd
from knlightning.analysis.settings import LEARNING_RATE, Value
from knlightning.analysis.variants import Variant
from knlightning.commands.benchmark import benchmark
from knlightning.commands.landscape import landscape
from knlightning.commands.output import save_figure, say, write_text
from knlightning.commands.trials import DIVERGED, FURTHER, RESULT, Trials, read_result, record, run_search
from knlightning.run_directory import ROOT, checkpoint_in, replacing_folder

NETWORK_VARIANTS: list[Variant] = ["kernel", "algorithm1", "batch", "batch-primitives"]
PANELS: tuple[Table, ...] = ("1", "2", "4")
"""Tables whose runs are drawn in Figure 4."""
HARMLESS = (
    *("data.root", "data.download", "data.num_workers", "data.pin_memory", "data.eval_batch_size"),
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.precision"),
    *("trainer.accumulate_grad_batches", "trainer.enable_progress_bar", "trainer.log_every_n_steps"),
)
"""Settings with which results still are those of the paper."""
TINY_BENCHMARKS: dict[Preset, dict[str, Any]] = {
    "table6": {"resolutions": [32], "batch_size": 2, "rounds": 1},
    "table8": {"resolutions": [32, 64], "batch_size": 1, "rounds": 1},
}
TINY_LANDSCAPE: dict[str, Any] = {"num_images": 64, "points": 9, "draws": 5}


class Reproduction:
    """What is reproduced, where, and what was found so far.

    Args:
        scale: "tiny" for small networks on digits.
        seeds: Number of runs for each row; None for 3, and 2 for tiny.
        out: Directory of the runs and of the report; None for runs/reproduce, and runs/reproduce_tiny.
        overrides: Values of the configuration by dotted names, for all runs.
        chosen: The rows of the paper that are wanted.
        parallel: How many runs go on at a time, see `knlightning.analysis.parallel.Pool`.
        cluster: Address of a Ray cluster, see there.
    """

    def __init__(
        self,
        scale: Scale,
        seeds: int | None,
        out: Path | None,
        overrides: Mapping[str, str],
        chosen: Sequence[Row],
        parallel: int = 1,
        cluster: str | None = None,
    ) -> None:
        self.scale, self.overrides = scale, overrides
        self.seeds = seeds or (3 if scale == "paper" else 2)
        self.out = out or ROOT / ("reproduce" if scale == "paper" else "reproduce_tiny")
        given = {"scale": None if scale == "paper" else scale, "seeds": seeds, "out": out, **overrides}
        self.options = "".join(f" --{key} {value}" for key, value in given.items() if value is not None)
        changed = [key for key in overrides if key.replace(".init_args", "") not in HARMLESS]
        self.obstacle = "tiny scale" if scale == "tiny" else f"other {', '.join(changed)}"
        self.obstacle *= bool(changed) or scale == "tiny"
        pairs = [(row if scale == "paper" else tiny(row), row.command) for row in reversed(chosen)]
        self.chosen = {row.name: command for row, command in pairs if row}  # with the command for the row of the paper
        self.trials = Trials(self.out, parallel, cluster)
        self.machine = machine(choose_device("auto"))
        self.findings: list[Finding] = []
        if (self.out / "findings.json").is_file():
            self.findings = [Finding(**found) for found in json.loads((self.out / "findings.json").read_text())]

    def report(self, *found: Finding) -> None:
        """Add findings, in the place of earlier ones of the same, and write the report."""
        new = {_key(finding): finding for finding in found}
        old = {_key(finding): finding for finding in self.findings}
        self.findings = list((old | new).values())
        about = {key: str(value) for key, value in self.machine.items()}
        if self.scale == "tiny":
            about["scale"] = "tiny: small networks on digits, which say nothing of the paper but that all of it runs"
        about["command"] = f"knl reproduce --all{self.options}"
        write_text(self.out / "findings.json", json.dumps([asdict(finding) for finding in self.findings], indent=1))
        write_text(self.out / "report.md", write_markdown(self.findings, about, self.out))
        write_text(self.out / "report.html", write_html(self.findings, about, self.out))

    def rows(self, table: Table) -> list[Row]:
        """Return the rows of a table that are wanted.

        Raises:
            FileNotFoundError: If the working directory has no configuration files.
        """
        rows = [row for row in rows_of(table, self.scale) if row.name in self.chosen]
        for row in rows:
            if not row.path.is_file():
                raise FileNotFoundError(f"no {row.path} in {Path.cwd()}: start in the directory of the project")
        return rows

    def scores(self, table: Table) -> None:
        """Train for the rows of a table; a row is reported after each of its runs."""
        rows = self.rows(table)
        if rows:
            say(f"\n{TITLES[table]}\n\n| network | published | reproduced |\n| --- | --- | --- |")
        reached_by = self.trials.map(
            lambda pair: self._run(*pair), [(row, s) for row in rows for s in range(self.seeds)]
        )
        for row in rows:
            runs = []
            for run in islice(reached_by, self.seeds):
                runs.append(run)
                spent = sum(read_result(self.directory(row, seed) / RESULT)["seconds"] for seed in range(len(runs)))
                command = self.chosen[row.name] + self.options
                self.report(compare_scores(table, row, runs, command, spent, self.obstacle))
            reached = " / ".join(mean_and_sd(values) for values in zip(*runs, strict=True))
            say(f"| {', '.join(labels_of(row).values())} | {row.published} | {reached} |")

    def learning_rates(self) -> None:
        """Search the learning rates of Table 5."""
        for row in self.rows("1"):
            if self.scale == "tiny" and (row.batch_size != 32 or row.norm not in ("batch", "kernel")):
                continue
            settings = {key: value for key, value in {**row.settings, **self.overrides}.items() if key != LEARNING_RATE}
            start = START if self.scale == "paper" else 2 * float(row.settings[LEARNING_RATE])
            directory = self.out / f"5-{row.name}"
            say(f"\nTable 5: {', '.join(labels_of(row).values())}\n")
            found = run_search(
                self.trials, row.path, directory, settings, start, 1, max_halvings=12 if self.scale == "paper" else 1
            )
            spent = sum(read_result(trial.directory / RESULT)["seconds"] for trial in found.trials)
            command = self.chosen[row.name].replace("--table 1", "--table 5") + self.options
            self.report(compare_learning_rates(row, found.learning_rate, command, spent, self.obstacle))

    def network_costs(self) -> None:
        """Measure Tables 6 and 7."""
        command = f"knl reproduce --table 6{self.options}"
        self.report(*compare_network_costs(self._measured("table6", NETWORK_VARIANTS), self._where(), command))

    def layer_costs(self) -> None:
        """Measure Table 8."""
        command = f"knl reproduce --table 8{self.options}"
        self.report(*compare_layer_costs(self._measured("table8", ["kernel", "algorithm1"]), self._where(), command))

    def convergence(self) -> None:
        """Train for Figure 4, and draw it."""
        panels: dict[str, dict[str, list[Path]]] = {}
        for table in PANELS:
            rows = [row for row in self.rows(table) if row.backbone.endswith(("resnet18", "resnet8"))]
            for row in rows:
                if not row.backbone.startswith("preact"):
                    for seed in range(self.seeds):
                        self._run(row, seed)
                    runs = [self.directory(row, seed) for seed in range(self.seeds)]
                    lines = panels.setdefault(f"Table {table}, batch size {row.batch_size}", {})
                    lines[f"{row.backbone}, {row.norm}"] = [run for run in runs if (run / "metrics.csv").is_file()]
        save_figure(draw_convergence(panels), self.out / "figure4.png")
        command = f"knl reproduce --figure 4{self.options}"
        for title, lines in panels.items():
            lines = {name: runs for name, runs in lines.items() if runs}  # without those that diverged at once
            kernel = next((name for name in lines if name.endswith("kernel")), "")
            if kernel and len(lines) > 1:
                self.report(compare_convergence(title, lines, kernel, command, self.obstacle))

    def landscape(self) -> None:
        """Train for Figure 7, with seed 0, and draw it."""
        runs = {}
        for row in self.rows("cifar10"):
            self._run(row, 0)
            runs[row.norm] = checkpoint_in(self.directory(row, 0), "last")
        data = {key.removeprefix("data."): v for key, v in self.overrides.items() if key.startswith("data.")}
        results = landscape(
            runs, out=self.out / "landscape", data=data, **(TINY_LANDSCAPE if self.scale == "tiny" else {})
        )
        self.report(*compare_landscapes(results, f"knl reproduce --figure 7{self.options}", self.obstacle))

    def directory(self, row: Row, seed: int) -> Path:
        """Return the directory of a run."""
        return self.out / row.name / f"seed{seed}"

    def _run(self, row: Row, seed: int) -> list[float]:
        """Return what a run has reached on the test images in %: what is published of the row, in the same order."""
        settings: dict[str, Value] = {**row.settings, "seed_everything": seed, **self.overrides}
        try:
            reached = self.trials.run(self.directory(row, seed), row.path, settings)
        except FloatingPointError as error:
            say(str(error))
            reached = DIVERGED | dict.fromkeys(FURTHER, 0.0)
            record(self.directory(row, seed), row.path, settings, reached)
        return [100 * reached[name] for name in ("test", *FURTHER[: len(row.further)])]

    def _measured(self, preset: Preset, variants: list[Variant]) -> list[dict[str, Any]]:
        """Return the rows of a benchmark, measured now unless they are there as a whole."""
        folder = self.out / preset
        if not folder.is_dir():
            with replacing_folder(folder) as temporary:
                settings = TINY_BENCHMARKS[preset] if self.scale == "tiny" else {}
                benchmark(preset, variants=variants, out=temporary, **settings)
        rows: list[dict[str, Any]] = json.loads((folder / f"{preset}.json").read_text())["rows"]
        return rows

    def _where(self) -> str:
        return str(self.machine.get("gpu", self.machine["processor"]))


def _key(finding: Finding) -> tuple[str, ...]:
    return finding.section, *finding.labels.values()
