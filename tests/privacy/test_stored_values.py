import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from privacy.private_runs import SAMPLES, privacy, task, trainer
from standins import RandomData
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MeanMetric

from knlightning.callbacks import BestCheckpoint
from knlightning.privacy.stored_values import StoredValues
from knlightning.tasks import ClassificationTask

FOLLOWS = r"follows {}, a value of the training samples without noise"


class Logs(ClassificationTask):
    """Logs values of training samples under names that do not say so."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        super().on_train_epoch_end()
        self.log("spread", 1.0)


def fit(tmp_path, module, *callbacks, **settings):
    """A private run; its random pixels need no trial step."""
    run = trainer(
        tmp_path, privacy(check=False), *callbacks, **({"max_epochs": 1, "enable_checkpointing": True} | settings)
    )
    run.fit(module, RandomData(SAMPLES, 5))
    return run


class Last(ModelCheckpoint):
    CHECKPOINT_NAME_LAST = "last-{train/loss:.4f}"


@pytest.mark.parametrize(
    "follower",
    [
        Last(save_last=True),
        BestCheckpoint("train/loss"),
        ModelCheckpoint(monitor="train/acc"),
        ModelCheckpoint(filename="{epoch}-{train/loss:.4f}", monitor="val/loss"),
        EarlyStopping("train_loss"),
        EarlyStopping("train/images_per_s"),
    ],
)
def test_followers_of_training_values_are_refused_by_name(tmp_path, follower):
    run = trainer(tmp_path, follower, enable_checkpointing=True)
    with pytest.raises(ValueError, match=FOLLOWS.format("train.*")):
        privacy().check_before(run, task(), None)


@pytest.mark.parametrize(
    "follower",
    [
        ModelCheckpoint(monitor="loss"),
        ModelCheckpoint(monitor="loss_epoch"),
        ModelCheckpoint(filename="{loss_step}"),
        EarlyStopping("spread"),
    ],
)
def test_followers_of_what_training_logs_are_refused_before_any_checkpoint(tmp_path, follower):
    module = task(kind=Logs)
    with pytest.raises(ValueError, match=FOLLOWS.format("loss|spread")):
        fit(tmp_path, module, follower)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_schedules_that_follow_a_training_value_are_refused(tmp_path):
    module = task()
    module.configure_optimizers = lambda: {
        "optimizer": (optimizer := torch.optim.SGD(module.parameters(), lr=0.1)),
        "lr_scheduler": {"scheduler": ReduceLROnPlateau(optimizer), "monitor": "train/loss"},
    }
    with pytest.raises(ValueError, match="ReduceLROnPlateau " + FOLLOWS.format("train/loss")):
        fit(tmp_path, module)


def test_followers_of_the_validation_go_on(tmp_path):
    module = task(kind=Logs)
    best = BestCheckpoint("val/acc")
    fit(tmp_path, module, best, EarlyStopping("val/loss"), limit_val_batches=None, max_epochs=2)
    assert best.best_model_path
    assert "log" not in vars(module)


class Counts(ClassificationTask):
    """Counts samples, in a buffer."""

    def training_step(self, batch, batch_idx):
        self.seen += len(batch[0])
        return super().training_step(batch, batch_idx)


class Keeps(ClassificationTask):
    """Keeps the loss of training in a metric that is stored."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.kept.update(outputs["loss"])


def test_frozen_parameters_that_training_samples_change_are_refused(tmp_path):
    counts = task(kind=Counts)
    counts.seen = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
    with pytest.raises(ValueError, match="a training step has changed seen"):
        trainer(tmp_path, privacy(check=False), max_epochs=1).fit(counts, RandomData(SAMPLES, 5))


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize(("batch", "epochs"), [(5, 1), (20, 1), (20, 2)])
def test_state_that_training_samples_change_is_refused_if_it_is_stored(tmp_path, persistent, batch, epochs):
    counts, keeps = task(kind=Counts), task(kind=Keeps)
    counts.register_buffer("seen", torch.zeros(()), persistent)
    keeps.kept = MeanMetric()
    keeps.kept.persistent(persistent)
    for module, name in ((counts, "seen"), (keeps, "kept.mean_value")):
        run = trainer(tmp_path, privacy(check=False), max_epochs=epochs)
        if persistent:
            with pytest.raises(ValueError, match=rf"a training step has changed {name}, which checkpoints hold"):
                run.fit(module, RandomData(SAMPLES, batch))
        else:
            run.fit(module, RandomData(SAMPLES, batch))
            assert (counts.seen if name == "seen" else keeps.kept.weight) > 0


def test_what_else_changes_a_task_is_not_training(tmp_path):
    class Epochs(ClassificationTask):
        """Knows the epoch, and counts validation images, which are not private."""

        def on_train_epoch_start(self):
            self.epoch += 1

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.seen += len(batch[0])

    module = task(kind=Epochs)
    module.register_buffer("epoch", torch.zeros(()))
    module.register_buffer("seen", torch.tensor([0.0, torch.nan]))
    fit(tmp_path, module, max_epochs=3, limit_val_batches=None, enable_checkpointing=False)
    assert module.epoch == 3


def test_states_of_any_kind_are_compared():
    class Extra(ClassificationTask):
        extra = None

        def get_extra_state(self):
            return self.extra

        def set_extra_state(self, state):
            pass

    module = task(kind=Extra)
    values = StoredValues(module)
    module.extra = [torch.ones(2)]
    for _ in range(2):
        values.check()  # the same, though its tensors have no truth value
    module.extra = {"seen": 3}
    with pytest.raises(ValueError, match="_extra_state"):
        values.check()
