from types import SimpleNamespace

import pytest
import standins
from lightning.pytorch import Trainer
from standins import RandomData, TinyNet

from knlightning.callbacks import stopwatch
from knlightning.callbacks.stopwatch import Stopwatch
from knlightning.tasks import ClassificationTask


class Slow(ClassificationTask):
    """Takes 0.5 s of a clock to train on a batch."""

    now = 0.0

    def training_step(self, batch, batch_idx):
        self.now += 0.5
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("samples", "seconds", "batches", "said"),
    [
        (40, 2.0, 5, "500 ms a batch, 5 seconds an epoch, without validation; 20.0 minutes for 240 epochs"),
        (40, 0.1, 1, "500 ms a batch, 5 seconds an epoch, without validation; 20.0 minutes for 240 epochs"),
        (8, 0.1, 1, "500 ms a batch, 1 seconds an epoch, without validation; 4.0 minutes for 240 epochs"),
    ],
)
def test_time_by_a_few_batches(monkeypatch, samples, seconds, batches, said):
    task = Slow(TinyNet(3))
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: task.now))
    watch = Stopwatch(seconds)
    trainer = standins.trainer(None, watch, max_epochs=240, limit_val_batches=0)
    trainer.fit(task, RandomData(samples=samples, batch_size=4))
    assert watch.batches == batches
    assert watch.estimate(trainer) == said


def test_nothing_is_estimated_from_nothing():
    assert "cannot be timed" in Stopwatch().estimate(Trainer(accelerator="cpu", logger=False))
