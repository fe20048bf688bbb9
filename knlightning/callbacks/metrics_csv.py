"""Log of the metrics as a table, `metrics.csv` in the run directory."""

import csv
import os
import secrets
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from knlightning.callbacks.harmless import Harmless
from knlightning.run_directory import replacing


class MetricsCSV(Logger):
    """Write a row for each call of `log_metrics`: the step, then a column for each metric, empty where not logged.

    Lightning's CSVLogger deletes the table of the run that it resumes; this logger continues it. Every row is in the
    file when `log_metrics` returns. A table that is not one of its own, or damaged, is put aside, and a row that cannot
    be written, such as on a full disk, is left out with a warning: a log never ends a run.

    Args:
        directory: Folder of `metrics.csv`.
        first_step: Optimizer step at which the run starts or resumes. Rows from that step on, which an interrupted run
            has left, are dropped: these steps are trained again.
    """

    def __init__(self, directory: str | os.PathLike[str], first_step: int = 0) -> None:
        super().__init__()
        self.path = Path(directory) / "metrics.csv"
        self._first_step = first_step
        self._columns: list[str] | None = None
        self._harmless = Harmless()

    @property
    def name(self) -> str:
        """Return the name of the log: none, since the run directory says enough."""
        return ""

    @property
    def version(self) -> str:
        """Return the version of the log: none either."""
        return ""

    @property
    def save_dir(self) -> str:
        """Return the run directory."""
        return str(self.path.parent)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the hyperparameters are in `config.yaml`."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row."""
        with self._harmless(f"rows of {self.path}"):
            self._append({"step": step, **metrics})

    def _append(self, row: dict[str, Any]) -> None:
        if self._columns is None:
            self._take_over()
        assert self._columns is not None
        new = [name for name in row if name not in self._columns]
        if new:
            self._rewrite(self._read() or [], [*self._columns, *new])
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _read(self) -> list[dict[str, str]] | None:
        """Read the table; None if the file is none, or damaged."""
        if not os.path.lexists(self.path):
            return []
        if self.path.is_symlink() or not self.path.is_file():
            return None
        try:
            with self.path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file, strict=True)
                columns = list(reader.fieldnames or ["step"])
                rows = list(reader)
        except (ValueError, csv.Error):  # such as of bytes that are no text
            return None
        whole = columns[0] == "step" and len(set(columns)) == len(columns) and all(columns)
        if rows and None in rows[-1].values():  # a kill can cut the last row short: missing values are None, not ""
            rows.pop()
        for row in rows if whole else ():
            whole = whole and None not in row and None not in row.values() and row["step"].isdecimal()
            whole = whole and not any("\0" in value for value in row.values())
        return rows if whole else None

    def _rewrite(self, rows: list[dict[str, str]], columns: list[str]) -> None:
        with replacing(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        self._columns = columns  # not before: without them in the file, rows would not fit

    def _take_over(self) -> None:
        """Drop what a resumed run is going to log again."""
        rows = self._read()
        if rows is None:
            aside = self.path.with_name(f"metrics.damaged-{secrets.token_hex(4)}.csv")
            self.path.rename(aside)
            warnings.warn(f"{self.path} is damaged, or not written by this logger: it is now {aside}", stacklevel=2)
        kept = [row for row in rows or [] if int(row["step"]) < self._first_step]
        columns = list(kept[0]) if kept else ["step"]
        if self.path.is_file():
            self._rewrite(kept, columns)
        self._columns = columns
