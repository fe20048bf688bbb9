"""The directory of a run: its layout, how a new one is named, and how the checkpoints in it are found.

A run directory holds `config.yaml`, `checkpoints/last.ckpt`, `checkpoints/best.ckpt`, `metrics.csv`, the events of
TensorBoard and, after `knl predict`, `predictions.csv` or the folder `predictions`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("runs")
CHECKPOINTS = "checkpoints"
NAMED_CHECKPOINTS = ("last", "best")


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
