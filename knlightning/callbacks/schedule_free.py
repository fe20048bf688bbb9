"""Schedule-free optimizers in training and evaluation."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from knlightning.checks import check
from knlightning.internals.lightning import is_fitting


class ScheduleFree(Callback):
    """Evaluate and store the averaged weights of a schedule-free optimizer.

    Such an optimizer, as `schedulefree.AdamWScheduleFree` and `schedulefree.SGDScheduleFree`, trains other weights than
    those that are meant to be used; its methods `train` and `eval` go from the ones to the others. Validation and the
    checkpoints at the end of an epoch have the weights to use. A checkpoint within an epoch has those that are trained:
    it is there to go on from.

    Raises:
        ArgumentError: If the optimizer is none of these.

    Source: Defazio et al., The Road Less Scheduled (NeurIPS 2024).
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the optimizers."""
        for optimizer in trainer.optimizers:
            known = callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
            check(known, "optimizer", type(optimizer).__name__, "schedule-free, such as schedulefree.AdamWScheduleFree")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Go to the weights that are trained."""
        self._switch(trainer, "train")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go to the averaged weights."""
        if is_fitting(trainer) and not trainer.sanity_checking:
            self._switch(trainer, "eval")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go to the averaged weights, before the epoch's checkpoints."""
        self._switch(trainer, "eval")

    def _switch(self, trainer: Trainer, mode: str) -> None:
        for optimizer in trainer.optimizers:
            getattr(optimizer, mode)()
