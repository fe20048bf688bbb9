"""What a run has left in its directory: configuration, curves, best checkpoint, evaluations, privacy."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from knlightning.analysis.curves import read_metrics
from knlightning.callbacks.hparams import readable
from knlightning.callbacks.monitors import mode_of
from knlightning.checkpoint_files import check_checkpoint, read_checkpoint
from knlightning.privacy.ledger import read_report, statement
from knlightning.run_directory import CONFIG, NOT_PRIVATE, checkpoint_in

COUNTS = ("running_mean", "running_var", "num_batches_tracked")
"""How the names of tensors end that are no parameters."""
EVALUATIONS = ("test", "validate")
"""Folders that `knl test` and `knl validate` write, the more telling first."""


@dataclass(frozen=True)
class Evaluation:
    """What `knl test` or `knl validate` has written.

    Attributes:
        stage: "test" or "validate".
        folder: Where it lies.
        report: The content of its JSON file.
        classes: Rows of the table of classes; empty if there is none.
    """

    stage: str
    folder: Path
    report: dict[str, Any]
    classes: list[dict[str, str]]

    @property
    def scores(self) -> dict[str, float]:
        """The scores by their names without the stage; not those of single classes."""
        named = {name.partition("/")[2]: value for name, value in self.report["scores"].items()}
        return {name: value for name, value in named.items() if "/" not in name}


@dataclass(frozen=True)
class RunResults:
    """What a run has left.

    Attributes:
        path: Its directory.
        text: `config.yaml`.
        settings: What stands in it, flat and with short names.
        metrics: (epoch, value) of each metric.
        checkpoint: Which checkpoint counts, "best" or "last"; "" if there is none.
        epoch: Its epoch, from 0.
        num_parameters: Number of parameters of the network.
        evaluations: What was evaluated, the test first.
        privacy: What was promised and spent; "" if the run is not private.
    """

    path: Path
    text: str
    settings: dict[str, str | float | bool]
    metrics: dict[str, list[tuple[float, float]]]
    checkpoint: str
    epoch: int
    num_parameters: int
    evaluations: list[Evaluation]
    privacy: str

    @property
    def name(self) -> str:
        """Name and number of the run."""
        return f"{self.path.absolute().parent.name}/{self.path.absolute().name}"

    @property
    def network(self) -> str:
        """Name of the network."""
        return str(self.settings.get("model.backbone", self.settings.get("model", "")))

    @property
    def best(self) -> tuple[str, float] | None:
        """Name and value of the best score of validation, None if it is not logged."""
        monitor, mode = (str(self.settings.get(f"best_checkpoint.{key}", "")) for key in ("monitor", "mode"))
        values = [value for _, value in self.metrics.get(monitor, [])]
        lowest = mode == "min" or (mode == "auto" and mode_of(monitor, "auto") == "min")
        return (monitor, min(values) if lowest else max(values)) if values else None


def read_run(run: Path) -> RunResults:
    """Read what a run has left.

    Raises:
        FileNotFoundError: If it is no directory of a run.
        ValueError: If a file in it is damaged.
    """
    if not (run / CONFIG).is_file():
        raise FileNotFoundError(f"there is no {run / CONFIG}: name the directory of a run, such as runs/quickstart/0")
    text = (run / CONFIG).read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    kept = {f"best_checkpoint.{key}": value for key, value in (config.get("best_checkpoint") or {}).items()}
    which = next((which for which in ("best", "last") if checkpoint_in(run, which).is_file()), "")
    stored: dict[str, Any] = {"epoch": 0, "state_dict": {}}
    if which:
        path = checkpoint_in(run, which)
        stored = read_checkpoint(path, map_location="meta")
        check_checkpoint(path, stored, to_resume=False)
    tensors = {name: value for name, value in stored["state_dict"].items() if isinstance(value, torch.Tensor)}
    parameters = [name for name in tensors if name.startswith("backbone.") and not name.endswith(COUNTS)]
    report = read_report(run)
    return RunResults(
        path=run,
        text=text,
        settings=readable(config) | kept,
        metrics=read_metrics(run) if (run / "metrics.csv").is_file() else {},
        checkpoint=which,
        epoch=stored["epoch"],
        num_parameters=sum(tensors[name].numel() for name in parameters),
        evaluations=[found for stage in EVALUATIONS if (found := _read_evaluation(run / stage, stage))],
        privacy="" if report is None else report.get(NOT_PRIVATE) or f"Differentially private: {statement(report)}.",
    )


def _read_evaluation(folder: Path, stage: str) -> Evaluation | None:
    try:
        report = json.loads((folder / f"{stage}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{folder / stage}.json is damaged ({error}): run knl {stage} again") from error
    classes: list[dict[str, str]] = []
    if (folder / "classes.csv").is_file():
        with (folder / "classes.csv").open(newline="", encoding="utf-8") as file:
            classes = list(csv.DictReader(file))
    return Evaluation(stage, folder, report, classes)
