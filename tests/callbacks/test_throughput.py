import csv
import time

import pytest
from lightning.pytorch import Trainer
from standins import RandomData, TinyNet

from knlightning.callbacks import MetricsCSV, Throughput
from knlightning.tasks import ClassificationTask


class Slow(ClassificationTask):
    """Takes 0.05 s to train on a batch, and much longer to validate."""

    def training_step(self, batch, batch_idx):
        time.sleep(0.05)
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        time.sleep(0.5)


def test_images_by_the_seconds_spent_on_training(tmp_path):
    run = Trainer(
        logger=MetricsCSV(tmp_path),
        callbacks=[Throughput()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        max_epochs=2,
        log_every_n_steps=1,
        val_check_interval=1,  # in the middle of the epoch too
    )
    run.fit(Slow(TinyNet(3)), RandomData(samples=10, batch_size=4))
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rates = [float(row["train/images_per_s"]) for row in csv.DictReader(file) if row["train/images_per_s"]]
    assert len(rates) == 2
    # 3 batches of 0.05 s give at most 67 images/s; were the 1.5 s of validation counted, at most 6.1
    assert all(6.5 < rate <= 10 / 0.15 for rate in rates)
    assert rates[1] == pytest.approx(10 / 0.15, rel=0.6)
