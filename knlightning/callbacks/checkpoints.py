"""Checkpoints of a run: `checkpoints/best.ckpt` and `checkpoints/last.ckpt`."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from knlightning.callbacks.monitors import Mode, check_monitors, mode_of, warn_without_validation
from knlightning.callbacks.signals import Stopped, StopSignals
from knlightning.checkpoint_files import read_checkpoint
from knlightning.checks import check, check_number
from knlightning.run_directory import checkpoint_in, replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints so that a kill at any moment leaves the old file or the complete new one.

    Lightning's own writer uses the system's temporary directory. If that is another file system, its last step is a
    copy over the old file.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write a checkpoint to a path on a local file system.

        Raises:
            OSError: If it cannot be written, such as on a full disk; the old file is left.
        """
        with replacing(Path(path)) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # in the place of the error of the file, which says why
                cause = error.__context__
                raise (cause if isinstance(cause, OSError) else error) from None

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, once its checksums are verified; no code in it is run.

        Raises:
            ValueError: If it is damaged.
        """
        content: dict[str, Any] = read_checkpoint(path, map_location)
        return content


class LastCheckpoint(Checkpoint):
    """Write `checkpoints/last.ckpt` in the run directory at the end of every training epoch.

    It is also written, and the run ends, after the first step that follows a signal that asks the process to end
    (`knlightning.callbacks.signals`).

    Args:
        every_n_steps: Number of optimizer steps, at least 1, after which it is written within an epoch too; None for
            the ends of epochs alone.

    Raises:
        ArgumentError: If every_n_steps is below 1.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        check_number("every_n_steps", every_n_steps, at_least=1, integer=True, none="the ends of epochs alone")
        self.every_n_steps = every_n_steps
        self._signals = StopSignals()
        self._restored_optimizers: int | None = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Count what there is to go on from."""
        self._restored_optimizers = len(checkpoint.get("optimizer_states", ()))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for signals, from now on in the place of the trainer, which would end the run without a checkpoint.

        Raises:
            ValueError: If the checkpoint has not the states of all optimizers: the trainer would go on without.
        """
        if self._restored_optimizers not in (None, len(trainer.optimizers)):
            raise ValueError(
                f"{trainer.ckpt_path} holds the states of {self._restored_optimizers} optimizers, and this run has"
                f" {len(trainer.optimizers)}"
            )
        self._restored_optimizers = None
        self._signals.watch()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the run, if it is to end; what the epoch before has logged is written by now.

        Raises:
            Stopped: If a signal came.
        """
        if signum := self._signals.received_by_any(trainer):
            raise Stopped(signum)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save within an epoch.

        Raises:
            Stopped: If a signal came; the checkpoint is written then.
        """
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0  # else half a step would be lost
        if trainer.is_last_batch or not stepped:
            return
        signum = self._signals.received_by_any(trainer)
        if signum or (self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0):
            self._save(trainer)
        if signum:
            raise Stopped(signum)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of an epoch, after its validation."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined] # set where mypy does not look
            trainer.save_checkpoint(checkpoint_in(Path(trainer.default_root_dir), "last"), weights_only=False)


class BestCheckpoint(ModelCheckpoint):
    """Keep the weights of the epoch with the best score as `checkpoints/best.ckpt` in the run directory.

    It must come before LastCheckpoint, which stores the best score.

    Args:
        monitor: Name of the metric that is the score.
        mode: Whether the best score is the "max" or the "min"; "auto" for "min" if the name ends in "loss".

    Raises:
        ArgumentError: If monitor is no name, or mode is none of the three.
    """

    def __init__(self, monitor: str = "val/acc", mode: Mode = "auto") -> None:
        check(isinstance(monitor, str) and monitor != "", "monitor", monitor, "the name of a metric, such as 'val/acc'")
        super().__init__(filename="best", monitor=monitor, mode=mode_of(monitor, mode), enable_version_counter=False)

    def check_before(
        self, trainer: Trainer, pl_module: LightningModule, datamodule: LightningDataModule | None
    ) -> None:
        """Look for the metrics of all callbacks before any data are read.

        Raises:
            ArgumentError: If one of them is never logged.
        """
        check_monitors(trainer, pl_module)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run directory."""
        self.dirpath = str(checkpoint_in(Path(trainer.default_root_dir).absolute(), "best").parent)
        with warnings.catch_warnings():  # of course a run that resumes has checkpoints already
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for the metric before the first epoch.

        Raises:
            ArgumentError: If it is a metric of the validation, and the validation does not log it.
        """
        logged = list(trainer.callback_metrics)
        if logged and self.monitor is not None and self.monitor.startswith("val"):  # also val_loss, as others name it
            known = f"a metric that the validation logs ({', '.join(logged)})"
            check(self.monitor in logged, "monitor", self.monitor, known, "It is the score of the best checkpoint.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the score will never be there."""
        super().on_train_start(trainer, pl_module)
        if self.monitor is not None and self.monitor.startswith("val/") and trainer.limit_val_batches:
            warn_without_validation(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the best score if its file is still there, even if the run directory was moved."""
        assert self.dirpath is not None
        best = str(Path(self.dirpath) / "best.ckpt")
        if os.path.isfile(best) and state_dict["best_model_path"]:
            score = state_dict["best_model_score"]
            super().load_state_dict(
                state_dict
                | {"dirpath": self.dirpath, "best_model_path": best, "kth_best_model_path": best}
                | {"best_k_models": {best: score}, "last_model_path": ""}
            )
