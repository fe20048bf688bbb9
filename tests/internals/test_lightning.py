import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder
from lightning.pytorch.callbacks.progress import TQDMProgressBar
from standins import RandomData, TinyNet, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from knlightning.internals import lightning as internals
from knlightning.internals.lightning import counting_steps, overridden, prepared_batch, replaced_train_loader
from knlightning.tasks import ClassificationTask

MEND = "Lightning has changed: mend {} in knlightning/internals/lightning.py"
MENDING = "a release of Lightning has changed this; mend knlightning/internals/lightning.py, or keep to 2.6: "


def fit(tmp_path, *callbacks, ckpt_path=None, **kwargs):
    run = trainer(tmp_path, *callbacks, **kwargs)
    run.fit(ClassificationTask(TinyNet(3)), RandomData(), ckpt_path=ckpt_path)
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


def test_is_restoring(tmp_path):
    seen = {}

    class Asks(Callback):
        def on_load_checkpoint(self, trainer, *_):
            seen["load"] = internals.is_restoring(trainer)

        def on_train_start(self, trainer, *_):
            seen["train"] = internals.is_restoring(trainer)

    run = fit(tmp_path, max_epochs=1)
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    fit(tmp_path, Asks(), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert seen == {"load": True, "train": False}, MEND.format("is_restoring")


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


class Task(LightningModule):
    def __init__(self, loader=None):
        super().__init__()
        self.layer = nn.Linear(192, 3)
        self.seen = []
        if loader is not None:
            self.train_dataloader = lambda: loader

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[1].tolist())
        return self.layer(batch[0].flatten(1)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(LightningDataModule):
    def __init__(self, samples):
        super().__init__()
        self.dataset = TensorDataset(torch.rand(samples, 3, 8, 8), torch.arange(samples))

    def train_dataloader(self):
        return DataLoader(self.dataset, 4)


class Batches:
    """Batches with these labels, from no DataLoader."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __iter__(self):
        return ((torch.rand(len(row), 3, 8, 8), torch.tensor(row)) for row in self.labels)


class Entering(Callback):
    """Enters a context in `setup`, and leaves it in `teardown`."""

    def __init__(self, context):
        self.context = context

    def setup(self, trainer, pl_module, stage):
        self.entered = self.context(trainer)
        self.value = self.entered.__enter__()

    def teardown(self, trainer, pl_module, stage):
        self.entered.__exit__(None, None, None)


def test_a_step_that_is_set_on_a_task_is_taken(tmp_path):
    task, steps = Task(), []
    original = task.training_step

    def training_step(batch, batch_idx):
        steps.append(batch_idx)
        return original(batch, batch_idx)

    callback = Entering(lambda _: overridden(task, "training_step", training_step))
    trainer(tmp_path, callback, max_epochs=1).fit(task, Data(8))
    assert steps == [0, 1], MENDING + "Lightning calls training_step of the task's class, not that of the object"
    assert "training_step" not in vars(task)


def test_attributes_are_set_back():
    class Owner:
        size = 1

    owner, module = Owner(), nn.Linear(1, 1)
    with overridden(owner, "size", 2), overridden(module, "forward", 3), overridden(module, "extra", 4):
        assert (owner.size, module.forward, module.extra) == (2, 3, 4)
    assert owner.size == 1
    assert not {"forward", "extra"} & vars(module).keys()


@pytest.mark.parametrize("source", ["datamodule", "task", "argument"])
def test_loaders_of_any_source_are_replaced(tmp_path, source):
    data, seen = Data(8), []
    loader = data.train_dataloader()
    labels = [[1, 2], [0]]

    def replace(given):
        seen.append(given)
        return Batches(labels)

    callback = Entering(lambda run: replaced_train_loader(run, replace))
    task = Task(loader if source == "task" else None)
    run = trainer(tmp_path, callback, max_epochs=1)
    if source == "datamodule":
        run.fit(task, data)
    else:
        run.fit(task, loader if source == "argument" else None)
    assert isinstance(seen[0], DataLoader), MENDING + "fit_loop._data_source.dataloader() gave no loader"
    assert task.seen == labels, MENDING + "fit_loop._data_source no longer says what is trained on"
    assert not isinstance(run.fit_loop._data_source.instance, Batches)


@pytest.mark.parametrize("limit", [2, 1.0])
def test_users_count_steps(tmp_path, limit):
    shown = []

    class Bar(TQDMProgressBar):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            super().on_train_batch_start(trainer, module, batch, batch_idx)
            shown.append(("start", batch_idx))

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
            shown.append(("end", batch_idx, self.total_train_batches))

    bar, task = Bar(), Task()
    task.validation_step = lambda batch, batch_idx: shown.append("validation")
    run = trainer(
        tmp_path, bar, Entering(lambda run: counting_steps(run, 3)), enable_progress_bar=True,
        limit_train_batches=limit, val_check_interval=1, limit_val_batches=1, num_sanity_val_steps=0, max_epochs=1,
    )  # fmt: skip
    run.fit(task, DataLoader(Data(18).dataset, 3), DataLoader(Data(4).dataset, 4))
    assert run.global_step == 2, MENDING + "trainer.accumulate_grad_batches does not set the batches of a step"
    assert len(task.seen) == 6, MENDING + "trainer.limit_train_batches does not set the batches of an epoch"
    assert shown == [
        *[("start", 0)] * 3, ("end", 0, 2), "validation", *[("start", 1)] * 3, ("end", 1, 2), "validation",
    ], MENDING + "val_check_interval, or the methods of the progress bar"  # fmt: skip
    assert (type(bar), run.limit_train_batches, run.val_check_interval) == (Bar, limit, 1)
    assert run.accumulate_grad_batches == 1


def test_batches_are_prepared_as_in_training(tmp_path):
    class Hooks(Task):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [*batch, torch.zeros(1)]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] + 1, *batch[1:]]

    loader, task, found = DataLoader(Data(4).dataset, 4), Hooks(), []

    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            found.append(prepared_batch(trainer, pl_module, next(iter(loader))))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            found.append(batch)

    trainer(tmp_path, Start(), precision="64-true", max_epochs=1).fit(task, loader)
    prepared, trained = found
    assert len(prepared) == len(trained) == 3, MENDING + "task._on_before_batch_transfer does not call the task's hook"
    for one, other in zip(prepared, trained, strict=True):
        assert one.dtype == other.dtype, MENDING + "precision_plugin.convert_input"
        assert torch.equal(one, other), MENDING + "strategy.batch_to_device does not call on_after_batch_transfer"


class Counts(Callback):
    """Notes what is known when training starts, and while it runs."""

    def __init__(self):
        self.start, self.accumulating, self.resuming = None, [], []

    def on_train_start(self, trainer, *_):
        self.start = (internals.num_epochs_trained(trainer), internals.num_steps_left(trainer))

    def on_train_batch_end(self, trainer, *_):
        self.accumulating.append(internals.is_accumulating(trainer))

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        self.resuming.append(internals.is_resuming(pl_module))


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ({"max_epochs": 1}, (1, 4)),
        ({"max_steps": 1}, (0, 5)),
        ({"max_steps": 2}, (1, 4)),
        ({"max_steps": 3}, (1, 3)),
    ],
)
def test_epochs_and_steps_of_a_run_that_goes_on(tmp_path, stop, expected):
    """3 batches in 2 steps an epoch, 3 epochs: those that are over, and the steps that are left."""
    counts = Counts()
    both = {"accumulate_grad_batches": 2, "max_epochs": 3}
    fit(tmp_path, counts, **{**both, **stop}).save_checkpoint(tmp_path / "a.ckpt")
    mend = MEND.format("num_epochs_trained, num_steps_left, rewind_unfinished_epoch")
    assert counts.start == (0, min(stop.get("max_steps", 9), 2 * stop.get("max_epochs", 3))), mend
    assert counts.accumulating[:3] == [True, False, False][: len(counts.accumulating)], MEND.format("is_accumulating")
    run = fit(tmp_path, counts, ckpt_path=tmp_path / "a.ckpt", **both)
    assert counts.start == expected, mend
    assert (run.global_step, run.current_epoch) == (6, 3), mend
    assert counts.resuming == [True], MEND.format("is_resuming")
    run.validate(run.lightning_module, RandomData(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert counts.resuming == [True, False], MEND.format("is_resuming")


class Constant(ClassificationTask):
    def training_loss(self, images, labels):
        return 0 * self(images).sum() + 3.0


def test_losses_of_a_range_test_are_those_of_the_steps(tmp_path):
    finder = LearningRateFinder(num_training_steps=6, update_attr=False)
    run = trainer(tmp_path, finder, enable_checkpointing=True, max_epochs=2, log_every_n_steps=1)
    run.fit(Constant(TinyNet(3)), RandomData())
    losses = internals.unbiased_losses(finder.optimal_lr.results["loss"])
    assert losses == pytest.approx([3.0] * len(losses)), MEND.format("unbiased_losses")
