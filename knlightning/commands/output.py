"""What commands print and write: in the process of rank zero alone."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure

from knlightning.run_directory import replacing

_muted = False


@rank_zero_only
def say(message: str) -> None:
    """Print a message at once, unless within `muted`."""
    if not _muted:
        print(message, flush=True)


@contextmanager
def muted() -> Iterator[None]:
    """Let commands that are parts of another one say nothing."""
    global _muted
    _muted = True
    try:
        yield
    finally:
        _muted = False


@rank_zero_only
def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@rank_zero_only
def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a table of at least one row, all with the same keys."""
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@rank_zero_only
def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG file."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
