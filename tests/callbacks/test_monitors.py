import re
from pathlib import Path

import pytest
from commands.runs import refused
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from standins import TinyFCN, TinyNet, tiny_config, write_config

import knlightning
from knlightning.callbacks import EMA, BestCheckpoint, EarlyStopping
from knlightning.callbacks.monitors import LOGGED_BESIDE, check_monitors
from knlightning.checks import ArgumentError
from knlightning.privacy import private_metrics
from knlightning.tasks import ClassificationTask, SegmentationTask


class OwnCallback(Callback):
    pass


class OwnTask(ClassificationTask):
    pass


def trainer(*callbacks, **kwargs):
    return Trainer(accelerator="cpu", logger=False, callbacks=list(callbacks), **kwargs)


def classification():
    return ClassificationTask(TinyNet())


@pytest.mark.parametrize(
    ("make", "monitor"),
    [
        (classification, "val/acc"),
        (classification, "val/acc_top5"),
        (classification, "train/loss"),
        (classification, "train/loss_step"),
        (classification, "privacy/epsilon"),
        (classification, "epoch"),
        (lambda: SegmentationTask(TinyFCN()), "val/iou/road"),
        (lambda: SegmentationTask(TinyFCN()), "val/mean_acc"),
        (lambda: OwnTask(TinyNet()), "val/f1"),
        (LightningModule, "val/f1"),
    ],
)
def test_metrics_that_may_be_logged(make, monitor):
    check_monitors(trainer(BestCheckpoint(monitor), EMA()), make())


@pytest.mark.parametrize("monitor", ["val/mIoU", "acc", "vall/acc", "test/acc", "val/iou/road"])
@pytest.mark.parametrize("kind", [BestCheckpoint, EarlyStopping, ModelCheckpoint])
def test_metrics_that_nothing_logs(kind, monitor):
    with pytest.raises(ArgumentError, match=f"^monitor must be a metric that is logged .*, got '{monitor}'"):
        check_monitors(trainer(kind(monitor=monitor)), classification())


@pytest.mark.parametrize("never", [{"limit_val_batches": 0}, {"check_val_every_n_epoch": 4, "max_epochs": 3}])
@pytest.mark.parametrize("kind", [BestCheckpoint, EarlyStopping])
def test_without_validation_its_metrics_are_missing(kind, never):
    with pytest.raises(ArgumentError, match=rf"This run never validates \({next(iter(never))}="):
        check_monitors(trainer(kind(monitor="val/acc"), **never), classification())
    check_monitors(trainer(kind(monitor="train/acc"), **never), classification())


@pytest.mark.parametrize("often", [{"max_epochs": 4}, {"max_epochs": -1}, {"max_steps": 9}])
def test_a_rare_validation_is_one(often):
    check_monitors(trainer(BestCheckpoint(), check_val_every_n_epoch=4, **often), classification())


def test_callbacks_of_ones_own_may_log_anything():
    check_monitors(trainer(BestCheckpoint("acc"), OwnCallback()), classification())


def test_fast_dev_run_and_no_monitor():
    check_monitors(trainer(BestCheckpoint("acc"), fast_dev_run=True), classification())
    check_monitors(trainer(ModelCheckpoint()), classification())


def test_the_list_of_what_is_logged_beside_is_complete():
    code = "".join(path.read_text() for path in Path(knlightning.__file__).parent.rglob("*.py"))
    named = set(re.findall(r'\.log\("([^"]+)"', code) + re.findall(r'"(train/\w+)": self', code))
    assert named | {"privacy/epsilon", *private_metrics.NAMES} == set(LOGGED_BESIDE) - {"epoch", "step"}  # of Lightning


@pytest.mark.parametrize(("monitor", "said"), [("acc", "a metric that is logged"), (None, "a value other than null")])
def test_fit_refuses_before_it_trains(tmp_path, monkeypatch, capsys, monitor, said):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "tiny.yaml", tiny_config(max_epochs=1) | {"best_checkpoint": {"monitor": monitor}})
    assert f"best_checkpoint.monitor must be {said}" in refused(capsys, "fit", "--config", "tiny.yaml")
    assert not list(tmp_path.rglob("metrics.csv"))


@pytest.mark.parametrize(
    ("monitor", "mode", "expected"),
    [("val/loss", "auto", "min"), ("val/acc", "auto", "max"), ("val/miou", "auto", "max"), ("val/loss", "max", "max")],
)
def test_mode_follows_the_metric(monitor, mode, expected):
    assert EarlyStopping(monitor, mode, patience=2).mode == BestCheckpoint(monitor, mode).mode == expected
    with pytest.raises(ArgumentError, match="mode must be one of auto, min, max"):
        EarlyStopping(monitor, "most")
