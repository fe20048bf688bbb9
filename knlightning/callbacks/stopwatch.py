"""How long an epoch would take, from a few batches of it."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from knlightning.text import counted

WARM_UP = 3
"""Batches that do not count: the first ones start processes, and allocate memory."""


class Stopwatch(Callback):
    """End a run after a few batches, and estimate from them how long an epoch would take.

    Args:
        seconds: Time after which the training ends, from the first batch that counts; at least one batch counts.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds
        self.batches = 0
        self.elapsed = 0.0
        self._since: float | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch, with the time to read it."""
        now = time.perf_counter()
        if self._since is not None:
            self.batches += 1
            self.elapsed = now - self._since
        elif batch_idx + 1 >= min(WARM_UP, trainer.num_training_batches - 1):
            self._since = now
        if self.elapsed > self.seconds:
            trainer.should_stop = True

    def estimate(self, trainer: Trainer) -> str:
        """Say how long an epoch of training takes, and all of them."""
        if not self.batches:
            return "an epoch of a single batch cannot be timed"
        batch = self.elapsed / self.batches
        epoch = batch * trainer.num_training_batches
        said = f"{1000 * batch:.0f} ms a batch, {_duration(epoch)} an epoch, without validation"
        if trainer.max_epochs in (None, -1):
            return said
        return f"{said}; {_duration(epoch * trainer.max_epochs)} for {counted(trainer.max_epochs, 'epoch')}"


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} seconds"
