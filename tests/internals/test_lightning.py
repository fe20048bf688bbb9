import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from standins import RandomData, TinyNet

from knlightning.internals import lightning as internals
from knlightning.tasks import ClassificationTask

MEND = "Lightning has changed: mend {} in knlightning/internals/lightning.py"


def fit(tmp_path, *callbacks, **kwargs):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    run = Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), enable_checkpointing=False, **quiet, **kwargs)
    run.fit(ClassificationTask(TinyNet(3)), RandomData())
    return run


class Spy(Callback):
    def __init__(self):
        self.fitting, self.started = [], []

    def on_train_batch_end(self, trainer, *_):
        self.fitting.append(internals.is_fitting(trainer))
        self.started.append(internals.num_batches_started(trainer))

    def on_validation_end(self, trainer, *_):
        self.fitting.append(internals.is_fitting(trainer))
        self.started.append(internals.num_batches_started(trainer))


def test_is_fitting(tmp_path):
    spy = Spy()
    run = fit(tmp_path, spy, max_epochs=1, num_sanity_val_steps=0)
    assert spy.fitting == [True] * 4, MEND.format("is_fitting")
    run.validate(run.lightning_module, RandomData(), verbose=False)
    assert spy.fitting[4:] == [False], MEND.format("is_fitting")


def test_num_batches_started(tmp_path):
    spy = Spy()
    fit(tmp_path, spy, max_epochs=2, num_sanity_val_steps=0, val_check_interval=2)  # of 3 batches
    assert spy.started == [1, 2, 2, 3] * 2, MEND.format("num_batches_started")


@pytest.mark.parametrize("forgotten", [False, True])
def test_average_of_a_callback(tmp_path, forgotten):
    averaging = EMAWeightAveraging()
    assert internals.averaged_model(averaging) is None, MEND.format("averaged_model")
    run = fit(tmp_path, averaging, max_epochs=1)
    assert internals.averaged_model(averaging).n_averaged == 3, MEND.format("averaged_model")
    before = run.lightning_module.backbone.head.weight.detach().clone()
    run.lightning_module.backbone.head.weight.data.zero_()
    if forgotten:
        internals.forget_average(averaging)
    averaging.on_validation_epoch_start(run, run.lightning_module)
    put_back = run.lightning_module.backbone.head.weight.any()
    assert put_back != forgotten, MEND.format("forget_average")
    assert forgotten or run.lightning_module.backbone.head.weight.equal(before), MEND.format("averaged_model")
