import random

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from standins import RandomData, trainer
from torch import nn

from knlightning.callbacks import Seeding


class Recorder(LightningModule):
    """Notes the random numbers that augmentation and training step of each batch meet."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.drawn = {}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.training:
            self.augmentation = torch.rand(()).item()
        return batch

    def training_step(self, batch, batch_idx):
        numbers = (self.augmentation, torch.rand(()).item(), np.random.rand(), random.random())
        self.drawn[self.current_epoch, batch_idx] = numbers
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch, batch_idx):
        torch.rand(()), np.random.rand(), random.random()


def fit(root, recorder, seeding, ckpt_path=None, **kwargs):
    run = trainer(root, seeding, **kwargs)
    data = RandomData()
    run.fit(recorder, data.train_dataloader(), data.val_dataloader(), ckpt_path=ckpt_path)
    return run


@pytest.fixture
def whole(tmp_path):
    seed_everything(5, workers=True)
    recorder = Recorder()
    fit(tmp_path, recorder, Seeding(), max_epochs=3)
    return recorder.drawn


def test_every_batch_has_numbers_of_its_own(whole):
    assert len(whole) == 9
    assert len(set(whole.values())) == 9


@pytest.mark.parametrize("change", [{"num_sanity_val_steps": 0}, {"limit_val_batches": 0}, {"val_check_interval": 1}])
def test_numbers_depend_on_nothing_but_the_batch(tmp_path, whole, change):
    seed_everything(5, workers=True)
    torch.rand(17)
    recorder = Recorder()
    fit(tmp_path, recorder, Seeding(), max_epochs=3, **change)
    assert recorder.drawn == whole


def test_resumed_epoch_draws_the_same(tmp_path, whole):
    seed_everything(5, workers=True)
    run = fit(tmp_path, Recorder(), Seeding(), max_epochs=1)
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    recorder = Recorder()
    torch.manual_seed(99)
    fit(tmp_path, recorder, Seeding(), tmp_path / "a.ckpt", max_epochs=3)
    assert recorder.drawn == {key: value for key, value in whole.items() if key[0] > 0}


def test_another_seed_draws_other_numbers(tmp_path, whole):
    seed_everything(6, workers=True)
    recorder = Recorder()
    fit(tmp_path, recorder, Seeding(), max_epochs=3)
    assert not set(recorder.drawn.values()) & set(whole.values())


@pytest.mark.parametrize(("given", "expected"), [("8", 8), (None, 5)])
def test_seed_of_the_checkpoint_is_for_runs_without_one(monkeypatch, given, expected):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    if given:
        monkeypatch.setenv("PL_GLOBAL_SEED", given)
    seeding = Seeding()
    seeding.load_state_dict({"seed": 5})
    assert seeding.seed == expected
    assert seeding.state_dict() == {"seed": expected}
