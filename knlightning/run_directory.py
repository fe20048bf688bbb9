"""The directory of a run: its layout, how a new one is named, and how the checkpoints in it are found.

A run directory holds `config.yaml`, `checkpoints/last.ckpt`, `checkpoints/best.ckpt`, `metrics.csv`, the events of
TensorBoard and, after `knl predict`, `predictions.csv` or the folder `predictions`; of a private run, `privacy.json`.
`knl test` and `knl validate` write into the folders `test` and `validate`, `knl report` writes `report.html`.
"""

import fcntl
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path("runs")
CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
LOCK = ".lock"
NAMED_CHECKPOINTS = ("last", "best")
PRIVACY_REPORT = "privacy.json"
"""What a private run has spent."""
NOT_PRIVATE = "not_private"
"""Key of a report beside which there are checkpoints that it does not count, and that are not private."""

_locks: set[int] = set()
"""Open files of the locks that this process holds."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replace a file atomically: a reader, also after a kill at any moment, finds the old file or the whole new one.

    Args:
        path: The file to write; its directory is made if it is missing. If it is a link, the link is replaced.

    Yields:
        A temporary file in the same directory, which no other process uses. It is moved to `path` once it is written
        without an exception, and removed otherwise.

    Raises:
        OSError: If it cannot be written; the message names `path` and the cause.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # otherwise a power cut may leave the new name on an empty file
        temporary.replace(path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary), temporary):
            raise
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Replace a folder as a whole: a reader finds the old one, the new one or, for a moment, none.

    Args:
        path: The folder to write; that in which it lies is made if it is missing.

    Yields:
        A temporary folder beside it. It takes the place of `path` once it is written without an exception, and is
        removed otherwise.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _temporary(path), _temporary(path)
    try:
        temporary.mkdir()
        yield temporary
        with suppress(FileNotFoundError):
            path.rename(old)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def sweep(run: Path) -> None:
    """Remove the temporary files and folders that killed processes have left in a run."""
    for path in [*run.glob(".*.tmp"), *(run / CHECKPOINTS).glob(".*.tmp")]:
        pid = path.name[1:].partition("-")[0]
        if not (pid.isdecimal() and int(pid) != os.getpid() and _lives(int(pid))):
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run, so that no other process writes checkpoints into it. A process that dies holds it no longer.

    Args:
        run: Its directory, which must exist.

    Raises:
        BlockingIOError: If another process holds it.
    """
    path = run / LOCK
    file = _open_lock(path)
    _locks.add(file)
    try:
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # before it is given up: then nobody else can have it
        _locks.discard(file)
        os.close(file)


def numbered_runs(name: str) -> list[Path]:
    """List the runs `runs/NAME/0`, `runs/NAME/1`, ..., the newest first.

    Raises:
        OSError: If the folder cannot be read.
    """
    try:
        runs = [path for path in (ROOT / name).iterdir() if path.name.isdecimal()]
    except FileNotFoundError:
        return []
    return sorted(runs, key=lambda path: int(path.name), reverse=True)


def new_run(name: str) -> Path:
    """Make the next of the directories `runs/NAME/0`, `runs/NAME/1`, ...

    Raises:
        OSError: If it cannot be made.
    """
    while True:
        make_folder(ROOT / name)
        newest = next(iter(numbered_runs(name)), None)
        path = ROOT / name / str(0 if newest is None else int(newest.name) + 1)
        # another process may just have taken this number, or have removed the folder after a failed start
        with suppress(FileExistsError, FileNotFoundError):
            path.mkdir()
            return path


def make_folder(path: Path) -> None:
    """Make a folder, if there is none, and those in which it lies.

    Raises:
        NotADirectoryError: If something else has its name, or that of a folder in which it lies.
        OSError: If it cannot be made for another reason.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        what = "a link to nowhere" if os.path.islink(error.filename) else "no folder"
        raise NotADirectoryError(f"{path} cannot be made: {error.filename} is {what}") from error


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


def run_of_config(config: Path) -> Path | None:
    """Return the run directory whose configuration a file is; None if it is none.

    A run may have been renamed or copied since its configuration was written, so that the place that stands in it says
    nothing.
    """
    return config.parent if config.name == CONFIG and (config.parent / CHECKPOINTS).is_dir() else None


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


def _temporary(path: Path) -> Path:
    """Name what no other process uses, beside a path."""
    return path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _open_lock(path: Path) -> int:
    """Open the file of a lock, and take the lock."""
    while True:
        file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except BlockingIOError:
            holder = os.read(file, 200).decode(errors="replace").strip()
            holder = "".join(letter for letter in holder if letter.isprintable()) or "another process"
            os.close(file)
            raise BlockingIOError(
                f"{path.parent} is in use by {holder}: wait until it ends, or choose another directory (run_dir)"
            ) from None
        except FileNotFoundError:  # the process that held it has just removed the file
            pass
        except OSError:  # this file system knows no locks
            return file
        os.close(file)


def _forget_locks() -> None:
    """Close the locks in a process that was forked, such as one that loads data: it may outlive the one that trains."""
    for file in _locks:
        os.close(file)
    _locks.clear()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


os.register_at_fork(after_in_child=_forget_locks)
