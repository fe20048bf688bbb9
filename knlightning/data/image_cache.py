"""A cache file of small images that all processes of a machine map into memory and share."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knlightning.data.datasets import TensorImages

RECORD = np.dtype([("image", np.uint8, (3, 32, 32)), ("label", "<u2")])
"""One image in the cache, with its label from 0."""
PREFIX = ".imagenet32-"
"""How the names of folders begin in which a cache is written."""
SWEPT_AFTER = 60
"""Seconds after which such a folder may be removed if no process holds it."""


class MappedImages(TensorImages):
    """Images in a cache file that is mapped into memory, where all processes that read it share them.

    Args:
        path: A .npy file of `RECORD`s.
        labels: int64 `(N,)`.
    """

    def __init__(self, path: Path, labels: Tensor) -> None:
        super().__init__(torch.from_numpy(mapped(path)["image"]), labels)
        self.path = path

    def __getstate__(self) -> dict[str, Any]:
        """Leave the images out: a process that is not forked maps the file itself instead of receiving a copy."""
        return {key: value for key, value in vars(self).items() if key != "images"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, images=torch.from_numpy(mapped(state["path"])["image"]))


def mapped(path: Path) -> np.ndarray:
    """Map a cache file into memory.

    Returns:
        `RECORD`s `(N,)`; changes to them stay in this process.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        records = np.load(path, mmap_mode="c", allow_pickle=False)
        if records.dtype != RECORD or records.ndim != 1:
            raise ValueError(f"{records.dtype} of shape {records.shape}")
    except OSError:
        raise
    except Exception as error:  # a damaged header may raise nearly anything
        raise ValueError(f"{path}: a damaged cache ({error}). Delete it; it is written again from the data.") from error
    return records


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder for the time of the block, or until this process dies.

    Args:
        folder: The folder.

    Raises:
        BlockingIOError: If another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove what processes that were killed while they wrote a cache have left; it may be gigabytes.

    Args:
        folder: Where caches are written.
    """
    for left in folder.glob(f"{PREFIX}*"):
        # that of a living process is held; one that has only just been made is not yet
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > SWEPT_AFTER:
                with held(left):
                    shutil.rmtree(left)


def write_records(path: Path, blocks: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
    """Write a cache file atomically, so that no process ever sees a part of it.

    Args:
        path: The file.
        blocks: Images, uint8 `(n, 3, 32, 32)`, and labels from 0, `(n,)`.

    Raises:
        OSError: If the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        # a folder of this process's own: another one may be writing the same cache
        with tempfile.TemporaryDirectory(prefix=PREFIX, dir=path.parent) as folder, held(Path(folder)):
            unfinished = Path(folder) / path.name
            with unfinished.open("wb") as file:
                count = 0
                _write_header(file, count)
                for images, labels in blocks:
                    records = np.empty(len(images), RECORD)
                    records["image"], records["label"] = images, labels
                    file.write(records.tobytes())
                    count += len(images)
                file.seek(0)
                _write_header(file, count)  # numpy leaves room in it for the number to grow
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
    except OSError as error:
        raise OSError(
            f"{path}: the images cannot be written ({error}). Set cache_dir to a folder with enough space."
        ) from error


def _write_header(file: Any, count: int) -> None:
    descr = np.lib.format.dtype_to_descr(RECORD)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (count,)})
