"""Averages of the weights along the training."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

from knlightning.checks import check_number
from knlightning.internals.lightning import averaged_model, forget_average


class EMA(EMAWeightAveraging):
    """Keep an exponential moving average of the weights, which is evaluated and stored in their place.

    average = decay * average + (1 - decay) * weights, buffers (such as the statistics of batch normalization)
    included. Validation, and so the best score, is that of the average. In every checkpoint, `state_dict` holds the
    average: this is what `knl validate`, `test`, `predict` and `export` use, with or without this callback. The
    weights that are trained are stored as `current_model_state`. A run resumes from them if it has the callback;
    without the callback, training would go on from the average. The average begins as a copy of the weights at its
    first update; before that, the weights themselves are evaluated and stored.

    The average covers about the last every_n_steps / (1 - decay) steps, which should be far fewer than the run has.
    torchvision's recipes set every_n_steps=32 and derive the decay from the length of the run:
    1 - 2e-5 * (images in a batch, of all devices) * 32 / epochs; 0.9989 for 600 epochs with batches of 1024.

    Args:
        decay: Weight of the old average at each update, in [0, 1).
        every_n_steps: Optimizer steps from one update to the next, at least 1.
        start_epoch: Number of epochs at the beginning, such as those of the warm-up, that are not averaged.

    Raises:
        ArgumentError: If an argument is out of its range.
    """

    def __init__(self, decay: float = 0.9999, every_n_steps: int = 1, start_epoch: int = 0) -> None:
        check_number("decay", decay, at_least=0, below=1)
        check_number("every_n_steps", every_n_steps, at_least=1, integer=True)
        check_number("start_epoch", start_epoch, at_least=0, integer=True)
        super().__init__(decay=decay, update_every_n_steps=every_n_steps)
        self.start_epoch = start_epoch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the average if a run begins; forget that of an earlier one if it is evaluated."""
        forget_average(self)
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the average to the device, on which the weights were not yet when it was made."""
        average = averaged_model(self)
        assert average is not None
        average.to(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average."""
        if trainer.current_epoch >= self.start_epoch:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average in the place of the weights, once there is one."""
        if self._has_begun():
            super().on_validation_epoch_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the weights back."""
        if self._has_begun():
            super().on_validation_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the network, if there is one."""
        if self._has_begun():
            super().on_train_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the average as `state_dict`, and the weights that are trained as `current_model_state`."""
        average = averaged_model(self)
        if average is not None and not self._has_begun():
            average.module.load_state_dict(pl_module.state_dict())
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Load the average and the weights if a run resumes; an evaluation needs `state_dict` alone."""
        if averaged_model(self) is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _has_begun(self) -> bool:
        average = averaged_model(self)
        return average is not None and bool(average.n_averaged > 0)
