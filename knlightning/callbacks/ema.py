"""Averages of the weights along the training."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging


class EMA(EMAWeightAveraging):
    """Keep an exponential moving average of the weights, which is evaluated and stored in their place.

    average = decay * average + (1 - decay) * weights, buffers (such as the statistics of batch normalization)
    included. Validation, and so the best score, is that of the average. In every checkpoint, `state_dict` holds the
    average: this is what `knl validate`, `test`, `predict` and `export` use, with or without this callback. The
    weights that are trained lie under `current_model_state`, from which a run resumes, with the callback; without it
    training would go on from the average. The average begins as a copy of the weights at its first update; up to
    then there is none, and the weights themselves are evaluated and stored.

    It reaches back over about every_n_steps / (1 - decay) steps, which should be well below those of the run.
    torchvision's recipes set every_n_steps=32 and derive the decay from the length of the run:
    1 - 2e-5 * (images in a batch, of all devices) * 32 / epochs; 0.9989 for 600 epochs with batches of 1024.

    Args:
        decay: weight of the old average at each update, in [0, 1).
        every_n_steps: optimizer steps from one update to the next.
        start_epoch: epochs at the beginning, such as those of the warm-up, that are not averaged.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(self, decay: float = 0.9999, every_n_steps: int = 1, start_epoch: int = 0) -> None:
        for name, value, allowed, good in (
            ("decay", decay, "in [0, 1)", 0 <= decay < 1),
            ("every_n_steps", every_n_steps, "at least 1", every_n_steps >= 1),
            ("start_epoch", start_epoch, "at least 0", start_epoch >= 0),
        ):
            if not good:
                raise ValueError(f"EMA: {name} must be {allowed}, got {value}")
        super().__init__(decay=decay, update_every_n_steps=every_n_steps)
        self.start_epoch = start_epoch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the average if a run begins; forget that of an earlier one if it is evaluated."""
        self._average_model = None
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the average to the device, on which the weights were not yet when it was made."""
        assert self._average_model is not None
        self._average_model.to(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average."""
        if trainer.current_epoch >= self.start_epoch:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the average as `state_dict`, and the weights that are trained as `current_model_state`."""
        if self._average_model is not None and not self._begun():
            self._average_model.module.load_state_dict(pl_module.state_dict())
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take up average and weights again if a run resumes; evaluation goes without, by `state_dict` alone."""
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _begun(self) -> bool:
        return self._average_model is not None and bool(self._average_model.n_averaged > 0)

    def _swap_models(self, pl_module: LightningModule) -> None:
        if self._begun():
            super()._swap_models(pl_module)

    def _copy_average_to_current(self, pl_module: LightningModule) -> None:
        if self._begun():
            super()._copy_average_to_current(pl_module)
