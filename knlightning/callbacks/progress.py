"""The progress of a run, in one line."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

SHORT_NAMES = {"train/loss_step": "loss", "train/images_per_s": "img/s", "privacy/epsilon": "epsilon"}
"""What the line calls the values of a run; others keep their name."""
SECONDS_BETWEEN_LINES = 60.0
"""How often a log, which is no terminal, gets a line within an epoch."""


class Progress(TQDMProgressBar):
    """Show epoch, batches, time, loss, speed and the validated metric in one line, whatever the width of the terminal.

    A terminal has a bar for each epoch, which stays. A log file or a notebook gets a line at the end of each epoch, and
    within an epoch one a minute.
    """

    BAR_FORMAT = "{desc} |{bar}| {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"

    def __init__(self) -> None:
        super().__init__(leave=True)
        self._terminal = sys.stdout.isatty()
        self._since = self._printed = 0.0
        self._begun: int | None = None  # the epoch that is shown

    @property
    def is_enabled(self) -> bool:
        """Whether there are bars."""
        return super().is_enabled and self._terminal

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Shorten names and numbers."""
        values = super().get_metrics(trainer, pl_module)
        values.pop("v_num", None)
        return {SHORT_NAMES.get(name, name): _short(value) for name, value in values.items()}

    def on_train_start(self, *_: Any) -> None:
        """Make no bar yet: each epoch has its own."""
        self.train_progress_bar = Tqdm(disable=True)
        self._begun = None

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Name the epoch."""
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description_str(_epoch(trainer))
        self._since = self._printed = time.monotonic()
        self._begun = trainer.current_epoch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to show an epoch within which the run goes on: Lightning does not say that it starts."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._begun != trainer.current_epoch:
            self.on_train_epoch_start(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the batch."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if time.monotonic() - self._printed > SECONDS_BETWEEN_LINES:
            self._print_line(trainer, pl_module, f" {batch_idx + 1}/{self.total_train_batches}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._begun is not None:  # else the run has resumed behind the last batch
            self._print_line(trainer, pl_module, "")

    def on_train_end(self, *_: Any) -> None:
        """Do nothing: the bar of the last epoch is closed."""

    def _print_line(self, trainer: Trainer, pl_module: LightningModule, place: str) -> None:
        if self._terminal or not super().is_enabled:
            return
        self._printed = time.monotonic()
        seconds = self.train_progress_bar.format_interval(self._printed - self._since)
        metrics = (f"{name}={value}" for name, value in self.get_metrics(trainer, pl_module).items())
        print(f"{_epoch(trainer)}{place} {seconds}, {', '.join(metrics)}", flush=True)


def _epoch(trainer: Trainer) -> str:
    """Count epochs from zero, as the logs do."""
    last = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs - 1}"
    return f"Epoch {trainer.current_epoch}{last}"


def _short(value: Any) -> Any:
    """Write a number with three digits, or with all before the point."""
    if not isinstance(value, float):
        return value
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
