import csv
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from standins import RandomData, TinyNet, trainer

from knlightning.callbacks import MetricsCSV, TensorBoardLog, Throughput, throughput
from knlightning.tasks import ClassificationTask


class Slow(ClassificationTask):
    """Takes 0.5 s of a clock to train on a batch, and much longer to validate."""

    now = 0.0

    def training_step(self, batch, batch_idx):
        self.now += 0.5
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        self.now += 100


def test_images_by_the_seconds_spent_on_training(tmp_path, monkeypatch):
    task = Slow(TinyNet(3))
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: task.now))
    often = {"log_every_n_steps": 1, "val_check_interval": 1}  # validation in the middle of the epoch too
    run = trainer(tmp_path, Throughput(), logger=MetricsCSV(tmp_path), max_epochs=2, **often)
    run.fit(task, RandomData(samples=10, batch_size=4))
    with (tmp_path / "metrics.csv").open(newline="") as file:
        logged = [row for row in csv.DictReader(file) if row["train/images_per_s"]]
    assert [float(row["train/images_per_s"]) for row in logged] == pytest.approx([10 / 1.5] * 2)  # 3 batches an epoch
    assert [float(row["train/seconds"]) for row in logged] == [1.5] * 2


class Told(TensorBoardLog):
    """Keeps what it is told."""

    def __init__(self, directory):
        super().__init__(directory)
        self.told = []

    def count_images(self, images):
        self.told.append(images)


@pytest.mark.parametrize("counted", [True, False, "private"])
def test_images_are_counted_over_resumed_runs(tmp_path, counted):
    """Not in the checkpoints of private runs, which their number would tell of the samples."""
    keeps_ledger = Callback()
    keeps_ledger.ledger = None

    def fit(epochs, ckpt_path=None):
        log = Told(tmp_path)
        others = [keeps_ledger] if counted == "private" else []
        run = trainer(tmp_path, Throughput(), *others, logger=log, max_epochs=epochs, log_every_n_steps=1)
        run.fit(ClassificationTask(TinyNet(3)), RandomData(samples=10, batch_size=4), ckpt_path=ckpt_path)
        return run, log.told

    run, told = fit(1)
    assert told == [0, 4, 8, 10]
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    if not counted:  # a checkpoint of an earlier release
        stored = torch.load(tmp_path / "a.ckpt", weights_only=True)
        del stored["callbacks"]["Throughput"]
        torch.save(stored, tmp_path / "a.ckpt")
    assert fit(2, tmp_path / "a.ckpt")[1] == ([10, 14, 18, 20] if counted is True else [])
