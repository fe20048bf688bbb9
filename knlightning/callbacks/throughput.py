"""How fast a run trains."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size

from knlightning.callbacks.hparams import TensorBoardLog
from knlightning.protocols import KeepsLedger


class Throughput(Callback):
    """Log `train/images_per_s`: training images of an epoch on all devices, divided by `train/seconds` of training.

    The time for reading data counts, the time for validation does not. Of an epoch that is resumed in its middle the
    seconds since then are logged. The progress bar shows the value during the epoch; it is logged at its end.
    (Lightning's ThroughputMonitor counts over a window of batches, and needs two functions, which a configuration file
    cannot give.) TensorBoard is told how many images were seen since the start of the run, unless it goes on from a
    checkpoint that does not hold it, such as one of private training.
    """

    def __init__(self) -> None:
        self._images = 0
        self._seconds = 0.0
        self._since = 0.0
        self._seen = 0
        self._private = False
        self._loggers: list[TensorBoardLog] = []

    def state_dict(self) -> dict[str, Any]:
        """Store the number of images seen; 0 in private training, where it tells of the images."""
        return {"seen": 0 if self._private else self._seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self._seen = state_dict["seen"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, also for a run resumed within an epoch."""
        self._images, self._seconds, self._since = 0, 0.0, time.perf_counter()
        callbacks = trainer.callbacks  # type: ignore[attr-defined] # set where mypy does not look
        self._private = any(isinstance(callback, KeepsLedger) for callback in callbacks)
        self._loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLog)]
        if trainer.global_step and not self._seen:
            self._loggers = []
        self._tell()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._images, self._seconds, self._since = 0, 0.0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images."""
        images = extract_batch_size(batch) * trainer.world_size
        self._images += images
        self._seen += images
        self._tell()
        self._stop()
        pl_module.log("train/images_per_s", self._images / self._seconds, prog_bar=True, logger=False, batch_size=1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again."""
        self._since = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the throughput of the epoch, unless the run has resumed behind its last batch."""
        for logger in trainer.loggers if self._images else ():
            # not by pl_module.log, which writes only after the epoch's checkpoint
            speed = {"train/images_per_s": self._images / self._seconds, "train/seconds": self._seconds}
            logger.log_metrics({**speed, "epoch": trainer.current_epoch}, step=trainer.global_step - 1)

    def _tell(self) -> None:
        for logger in self._loggers:
            logger.count_images(self._seen)

    def _stop(self) -> None:
        now = time.perf_counter()
        self._seconds, self._since = self._seconds + now - self._since, now
