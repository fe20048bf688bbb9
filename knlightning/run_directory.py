"""The directory of a run: its layout, how a new one is named, and how the checkpoints in it are found.

A run directory holds `config.yaml`, `checkpoints/last.ckpt`, `checkpoints/best.ckpt`, `metrics.csv`, the events of
TensorBoard and, after `knl predict`, `predictions.csv` or the folder `predictions`; of a private run, `privacy.json`.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path("runs")
CHECKPOINTS = "checkpoints"
NAMED_CHECKPOINTS = ("last", "best")
PRIVACY_REPORT = "privacy.json"
"""What a private run has spent."""
NOT_PRIVATE = "not_private"
"""Key of a report beside which there are checkpoints that it does not count, and that are not private."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replace a file atomically: a reader, also after a kill at any moment, finds the old file or the whole new one.

    Args:
        path: The file to write; its directory is made if it is missing.

    Yields:
        A temporary file in the same directory, moved to `path` once it is written without an exception.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    yield temporary
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())  # otherwise a power cut may leave the new name on an empty file
    temporary.replace(path)


def numbered_runs(name: str) -> list[Path]:
    """List the runs `runs/NAME/0`, `runs/NAME/1`, ..., the newest first."""
    runs = [path for path in (ROOT / name).glob("*") if path.name.isdecimal()]
    return sorted(runs, key=lambda path: int(path.name), reverse=True)


def new_run(name: str) -> Path:
    """Make the next of the directories `runs/NAME/0`, `runs/NAME/1`, ..."""
    while True:
        newest = next(iter(numbered_runs(name)), None)
        path = ROOT / name / str(0 if newest is None else int(newest.name) + 1)
        try:
            path.mkdir(parents=True)
        except FileExistsError:  # another process has just taken this number
            continue
        return path


def checkpoint_in(run: Path, which: str) -> Path:
    """Return the path of the checkpoint "last" or "best" of a run, whether or not it exists."""
    return run / CHECKPOINTS / f"{which}.ckpt"


def holds_checkpoints(run: Path) -> bool:
    """Say whether a run has written a checkpoint."""
    return any((run / CHECKPOINTS).glob("*.ckpt"))


def run_of(checkpoint: Path) -> Path | None:
    """Return the run directory in which a checkpoint lies, None if it lies elsewhere."""
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else None


def report_directory(trainer: Any) -> Path:
    """Return where a run reports what it has spent: beside its checkpoints, so that no two runs meet.

    Args:
        trainer: In `fit`, after `setup`. All its processes must ask.
    """
    root = Path(trainer.default_root_dir).absolute()
    written = [Path(c.dirpath).absolute() for c in trainer.checkpoint_callbacks if getattr(c, "dirpath", None)]
    if root / CHECKPOINTS in written:  # a run directory
        return root
    if written:
        return written[0].parent if written[0].name == CHECKPOINTS else written[0]
    return Path(trainer.log_dir or root).absolute()


def mark_not_private(directory: Path, step: int) -> None:
    """Take its epsilon from the report of a run that goes on without privacy; nothing, if there is no report.

    Args:
        directory: That of the report.
        step: From which on steps are not private.
    """
    path = directory / PRIVACY_REPORT
    try:
        report = json.loads(path.read_text())
        report[NOT_PRIVATE]  # marked already
    except FileNotFoundError:
        pass
    except KeyError:
        said = (
            f"the run went on from step {step} without DifferentialPrivacy: checkpoints written since are not private"
        )
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({NOT_PRIVATE: said, **report, "epsilon": None}, indent=1) + "\n")
    except (ValueError, TypeError):
        path.unlink()  # damaged


def find_checkpoint(ckpt_path: str, run: Path | None, name: str) -> Path:
    """Find a checkpoint.

    Args:
        ckpt_path: "last", "best" or the path of a file.
        run: The run in which to look for "last" and "best"; None for the newest of `runs/NAME/*` that has it.
        name: Name of the runs.

    Returns:
        Its path.

    Raises:
        FileNotFoundError: If there is none; the message names where it was looked for.
    """
    if ckpt_path not in NAMED_CHECKPOINTS:
        if Path(ckpt_path).is_file():
            return Path(ckpt_path)
        raise FileNotFoundError(
            f"There is no file {ckpt_path}. A checkpoint is named by the path of a file, or by 'last' or 'best' for one"
            " of this run."
        )
    runs = numbered_runs(name) if run is None else [run]
    for candidate in runs:
        if checkpoint_in(candidate, ckpt_path).is_file():
            return checkpoint_in(candidate, ckpt_path)
    looked = ", ".join(str(checkpoint_in(candidate, ckpt_path)) for candidate in runs)
    raise FileNotFoundError(
        f"There is no checkpoint {ckpt_path!r}. Looked for {looked or ROOT / name / '*'}. Name the directory of the run"
        " (run_dir), or start a run with knl fit."
    )
