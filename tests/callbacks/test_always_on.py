import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import RichProgressBar
from standins import tiny_config, write_config

from knlightning.callbacks import CONFIGURED, made_for_every_run
from knlightning.commands.main import run


class Extra(Callback):
    """A callback of every run.

    Args:
        number: A number.
    """

    def __init__(self, number: int = 1):
        self.number = number


def names(callbacks):
    return [type(callback).__name__ for callback in callbacks]


def fit(tmp_path, monkeypatch, *args):
    monkeypatch.chdir(tmp_path)
    own = {"class_path": "lightning.pytorch.callbacks.ModelSummary"}
    config = tiny_config(max_epochs=1, limit_train_batches=1, limit_val_batches=1, callbacks=[own])
    return run(["fit", "--config", write_config(tmp_path / "a.yaml", config), "--pictures.every_n_epochs=0", *args])


def test_order(tmp_path, monkeypatch):
    assert names(fit(tmp_path, monkeypatch).trainer.callbacks) == [
        *("Seeding", "RunConfig", "Throughput", "HParams", "LearningRateMonitor"),
        "ModelSummary",  # of the configuration
        *("Pictures", "PredictionWriter"),
        *("BestCheckpoint", "LastCheckpoint"),
    ]


@pytest.mark.parametrize(
    ("trainer", "configured", "made"),
    [
        ({}, [], ["Throughput", "Summary", "Progress", "HParams"]),
        ({}, [RichProgressBar()], ["Throughput", "Summary", "HParams"]),
        ({"enable_progress_bar": False}, [], ["Throughput", "HParams"]),
    ],
)
def test_progress_is_shown_unless_it_is_disabled_or_shown_otherwise(trainer, configured, made):
    assert names(made_for_every_run("", {"trainer": trainer}, False, configured))[2:] == made


def test_without_a_logger_the_learning_rate_is_not_monitored(tmp_path, monkeypatch):
    made = names(fit(tmp_path, monkeypatch, "--trainer.logger=false").trainer.callbacks)
    assert made[:4] == ["Seeding", "RunConfig", "Throughput", "HParams"]
    assert "LearningRateMonitor" not in made


def test_one_more_takes_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGURED, "extra", (Extra, "One more"))
    (made,) = [c for c in fit(tmp_path, monkeypatch, "--extra.number=7").trainer.callbacks if isinstance(c, Extra)]
    assert made.number == 7
    assert "extra:\n  number: 7\n" in (tmp_path / "runs" / "a" / "0" / "config.yaml").read_text()
