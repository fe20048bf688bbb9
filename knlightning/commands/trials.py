"""Runs whose accuracies are compared: each with a directory of its own, trained and tested once."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import RLock
from typing import Any, Self

import yaml
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.live import Live
from rich.table import Table

from knlightning.analysis.parallel import Pool
from knlightning.analysis.search import Search, Trial, search
from knlightning.analysis.settings import LEARNING_RATE, Value
from knlightning.checks import check_number
from knlightning.commands.fit import FitCLI
from knlightning.commands.output import muted, say, write_csv
from knlightning.commands.test import TestCLI
from knlightning.commands.validate import ValidateCLI
from knlightning.privacy.search import write_search_report
from knlightning.run_directory import checkpoint_in, replacing

FURTHER = ("pixel_acc", "mean_acc")
"""Scores of a segmentation run besides its mean IoU."""
DIVERGED = {"val": 0.0, "test": 0.0, "diverged": 1.0}
"""Stands for the accuracies of a run whose loss was no longer finite."""
BY_TEST = (
    "ATTENTION: val_split is 0. Nothing is held out: where the data have no validation images of their own, the\n"
    "learning rate is chosen by the accuracy on the test images that is reported, as in the paper. Such accuracies\n"
    "are too high; compare them only with others of the same kind."
)
SHOWS_PROGRESS = "trainer.enable_progress_bar"
"""A run that is one of many has no progress of its own, unless it is asked for: a table grows by a line for each."""
TABLE = "| learning rate | seed | validation | test | run |\n| --- | --- | --- | --- | --- |"
"""Head of the table of a search."""
RESULT = "result.json"
"""Written into the directory of a run once it has been tested: its settings, and its accuracies."""


def run_trial(directory: Path, config: Path, settings: Mapping[str, Value]) -> dict[str, float]:
    """Train and test, or go on with what an interruption has left; what is done already is not repeated.

    Args:
        directory: Directory of the run.
        config: Configuration of the run.
        settings: What differs from it, by the dotted names of the command line, such as `data.init_args.batch_size`.

    Returns:
        Accuracies in [0, 1] of the weights after the last epoch: "val" and "test"; of a segmentation run these are the
        mean IoU, and there are "pixel_acc" and "mean_acc" on the test images too.

    Raises:
        ValueError: If the directory holds the result of other settings.
        FloatingPointError: If the loss is no longer finite.
    """
    plain = _plain(config, settings)
    path = directory / RESULT
    if path.is_file():
        result = read_result(path)
        if result["settings"] != plain:
            differing = sorted(key for key, _ in result["settings"].items() ^ plain.items())
            raise ValueError(
                f"{path} is of a run that differs in {', '.join(dict.fromkeys(differing))}: choose another directory,"
                " or remove this one"
            )
        accuracies: dict[str, float] = result["accuracies"]
        return accuracies
    options = {**plain, "run_dir": directory, SHOWS_PROGRESS: plain.get(SHOWS_PROGRESS, "false")}
    line = [f"--{key}={value}" for key, value in options.items()]
    accuracies, start = {}, time.perf_counter()
    with muted():
        FitCLI([*line, *(["--ckpt_path=last"] if checkpoint_in(directory, "last").is_file() else [])])
        for stage, command in (("val", ValidateCLI), ("test", TestCLI)):
            cli = command([*line, "--ckpt_path=last"])
            metrics = {name: value.item() for name, value in cli.trainer.callback_metrics.items()}
            accuracies[stage] = metrics[f"{stage}/{cli.model.main_metric}"]
    accuracies |= {name: metrics[f"test/{name}"] for name in FURTHER if f"test/{name}" in metrics}
    record(directory, config, settings, accuracies, time.perf_counter() - start)
    return accuracies


def read_result(path: Path) -> dict[str, Any]:
    """Read the result of a run.

    Args:
        path: The file.

    Returns:
        Its "settings", strings by name, its "accuracies", numbers by name, and the "seconds" that it took since it
        was last begun.

    Raises:
        ValueError: If the file is damaged; the message names it.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for value in result["accuracies"].values():
            check_number("accuracies", value, at_least=0, at_most=1)
        check_number("seconds", result.setdefault("seconds", 0.0), at_least=0)
        if not all(isinstance(value, str) for value in result["settings"].values()):
            raise ValueError("settings")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error!r}. Remove it, and the run is tested again") from error
    return result


@rank_zero_only
def record(
    directory: Path, config: Path, settings: Mapping[str, Value], accuracies: dict[str, float], seconds: float = 0.0
) -> None:
    """Write the result of a run, so that `run_trial` does not repeat it.

    Args:
        directory: Directory of the run.
        config: Configuration of the run.
        settings: What differs from it.
        accuracies: What `run_trial` returns for these settings.
        seconds: How long it took.
    """
    result = {"settings": _plain(config, settings), "accuracies": accuracies, "seconds": seconds}
    with replacing(directory / RESULT) as file:
        file.write_text(json.dumps(result, indent=1))


class Trials(Pool):
    """Runs of a command, one after the other or side by side: what is done is in `results.csv`, what goes on is shown.

    Args:
        out: Directory of the command, for `results.csv`.
        parallel: How many runs go on at a time, see `Pool`.
        cluster: Address of a Ray cluster, see `Pool`.

    Attributes:
        lock: To be held where threads meet.
    """

    def __init__(self, out: Path, parallel: int = 1, cluster: str | None = None) -> None:
        super().__init__(parallel, cluster)
        self.lock = RLock()
        self._out = out
        self._running: dict[Path, float] = {}
        self._done: dict[Path, dict[str, Any]] = {}
        self._titled = False
        self._live = Live(get_renderable=self._board, refresh_per_second=1, transient=True)

    def __enter__(self) -> Self:
        super().__enter__()
        if self.parallel > 1 and Console().is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.stop()
        super().__exit__(*error)

    def title(self, text: str) -> None:
        """Say the head of the table of a search; of several side by side a single one.

        Args:
            text: What stands above it, where a search has a table of its own.
        """
        with self.lock:
            if self.parallel == 1 or not self._titled:
                say(f"\n{text}\n" * (bool(text) and self.parallel == 1) + TABLE)
            self._titled = True

    def run(self, directory: Path, config: Path, settings: Mapping[str, Value]) -> dict[str, float]:
        """Do what `run_trial` does, and note the result.

        Args:
            directory: Directory of the run.
            config: Configuration of the run.
            settings: What differs from it.

        Raises:
            FloatingPointError: If the loss is no longer finite.
        """
        with self.slots:
            self._running[directory] = time.monotonic()
            try:
                reached = self.call(run_trial, directory, config, settings)
            except FloatingPointError:
                self._note(directory, DIVERGED)
                raise
            else:
                self._note(directory, reached)
                return reached
            finally:
                del self._running[directory]

    def _note(self, directory: Path, reached: Mapping[str, float]) -> None:
        with self.lock:
            seconds = round(time.monotonic() - self._running[directory], 1)
            scores = {stage: reached.get(stage) for stage in ("val", "test")}
            done = {"directory": directory, **scores, "diverged": "diverged" in reached, "seconds": seconds}
            self._done[directory] = done
            write_csv(self._out / "results.csv", list(self._done.values()))

    def _board(self) -> Table:
        """Tell of what goes on now how far it is."""
        table = Table("running", "minutes", "epoch", title=f"{len(self._done)} done", title_justify="left")
        for directory, start in list(self._running.items()):
            epoch = ""
            with suppress(OSError, ValueError, IndexError):  # not there yet, or without epochs
                path = directory / "metrics.csv"
                with path.open(encoding="utf-8") as file:
                    place = file.readline().rstrip().split(",").index("epoch")
                    file.seek(max(file.tell(), path.stat().st_size - 2000))
                    *_, last = file
                    epoch = last.rstrip().split(",")[place]
            table.add_row(str(directory), f"{(time.monotonic() - start) / 60:.0f}", epoch)
        return table


def run_search(
    trials: Trials,
    config: Path,
    out: Path,
    settings: Mapping[str, Value],
    start: float,
    seeds: int,
    patience: int = 1,
    max_halvings: int = 12,
    title: str = "",
    ahead: int = 1,
) -> Search:
    """Search the learning rate of a configuration, as `knlightning.analysis.search.search` does, with real runs.

    Runs that an earlier search in `out` has finished are not repeated; one that it has left unfinished goes on.

    Args:
        trials: What makes the runs.
        config: Configuration of a run; of segmentation, accuracies are the mean IoU.
        out: Directory in which every run gets its own; also for `trials.csv`.
        settings: What differs from the configuration, by dotted names.
        start: The highest learning rate.
        seeds: Number of runs with the best learning rate.
        patience: Learning rates in a row that must be worse than the best before it counts as passed.
        max_halvings: Halvings after which the search ends if the best has not been passed.
        title: What stands above the table of the search.
        ahead: How many learning rates are tried at a time.

    Returns:
        The runs, and the best learning rate.

    Raises:
        ValueError: If an argument is out of its range, or `out` holds runs of other settings.
    """
    done: list[Trial] = []
    trials.title(title)

    def train(learning_rate: float, seed: int) -> Trial:
        directory = out / f"rate{learning_rate:g}-seed{seed}"
        all_settings = {"seed_everything": seed, **settings, LEARNING_RATE: learning_rate}
        diverged = ""
        try:
            result = trials.run(directory, config, all_settings)
        except FloatingPointError as error:
            diverged = str(error)
            result = DIVERGED
            record(directory, config, all_settings, result)
        trial = Trial(learning_rate, seed, result["val"], result["test"], "diverged" in result, directory)
        reached = "diverged | diverged" if trial.diverged else f"{100 * trial.val:.2f} | {100 * trial.test:.2f}"
        with trials.lock:
            done.append(trial)
            write_csv(out / "trials.csv", [asdict(trial) for trial in done])  # after each: what is done is not lost
            if diverged:
                say(diverged)
            say(f"| {learning_rate:g} | {seed} | {reached} | {directory} |")
            note_privacy(out, done)
        return trial

    return search(train, _guessing, start, seeds, patience, max_halvings, trials.map, ahead)


@rank_zero_only
def note_privacy(out: Path, trials: Sequence[Trial]) -> None:
    """Say, and write, what the private runs of a search have spent together; nothing if they are not private.

    Args:
        out: Directory of the search.
        trials: Its runs so far.
    """
    if statement := write_search_report(out, [trial.directory for trial in trials]):
        say(f"Privacy of the search so far: {statement}")


def _plain(config: Path, settings: Mapping[str, Value]) -> dict[str, str]:
    return {"config": str(config), **{key: str(value) for key, value in settings.items()}}


def _guessing(trial: Trial) -> float:
    """Return the accuracy up to which a network may only have guessed; 0 if the number of classes is not known."""
    config = yaml.safe_load((trial.directory / "config.yaml").read_text())
    classes = config["model"]["init_args"]["backbone"].get("init_args", {}).get("num_classes")
    return min(3 / classes, 1 / classes + 0.15) if classes else 0.0
