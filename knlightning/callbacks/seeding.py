"""Random numbers that an interrupted run and a whole one have in common."""

import os
import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from knlightning.internals.lightning import is_fitting, num_batches_started


class Seeding(Callback):
    """Seed torch, numpy and random anew before every training batch, from (seed, epoch, batch, rank).

    Dropout masks and augmentation of a batch then depend on its place in the run and on nothing that happened before.
    No generator's state needs to be stored, and a run resumed from any of its checkpoints goes on as if it had never
    been interrupted. The seed is that of `seed_everything`; without one, that of the checkpoint, or 0.

    The loader keeps the order of the images: see `ResumableLoader` of knlightning.data. A plain DataLoader draws from
    torch's generator whenever it starts, and so changes the random numbers of an epoch's first batch.
    """

    def __init__(self) -> None:
        given = os.environ.get("PL_GLOBAL_SEED")
        self._given = given is not None
        self.seed = int(given or 0)

    def state_dict(self) -> dict[str, Any]:
        """Store the seed."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the seed of the checkpoint, unless another one is asked for."""
        if not self._given:
            self.seed = state_dict["seed"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed the batch at which a run resumed within an epoch goes on."""
        self._reseed(trainer, num_batches_started(trainer))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed the first batch of the epoch."""
        self._reseed(trainer, 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Seed the next batch: it is augmented before its own hooks are called."""
        self._reseed(trainer, batch_idx + 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed the next training batch, whatever the validation drew."""
        if is_fitting(trainer) and not trainer.sanity_checking:
            self._reseed(trainer, num_batches_started(trainer))

    def _reseed(self, trainer: Trainer, batch: int) -> None:
        mixed = np.random.SeedSequence([self.seed, trainer.current_epoch, batch, trainer.global_rank])
        seed = int(mixed.generate_state(1)[0])
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
