import pytest
from commands.runs import refused
from lightning.pytorch import Callback
from standins import tiny_config, write_config
from torch.optim import SGD

from knlightning.checks import ArgumentError
from knlightning.commands.errors import locate
from knlightning.commands.main import main

BACKBONE = "model.init_args.backbone"
OPTIMIZER = "model.init_args.optimizer"
SCHEDULE = "model.init_args.lr_scheduler"


@pytest.fixture
def refuse(empty, capsys):
    """Write a configuration with changes by dotted keys, and return what fit says of it."""

    def run(changes, *args):
        config = tiny_config(max_epochs=1, limit_train_batches=1, limit_val_batches=1)
        for key, value in changes.items():
            *path, last = key.split(".")
            inner = config
            for name in path:
                inner = inner.setdefault(name, {})
            inner[last] = value
        write_config(empty / "tiny.yaml", config)
        return refused(capsys, "fit", "--config", "tiny.yaml", *args)

    return run


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {f"{OPTIMIZER}.init_args.lr": None},
            f"{OPTIMIZER}.init_args.lr must be a value other than null, got None",
        ),
        ({f"{OPTIMIZER}.init_args.momentum": -1}, f"{OPTIMIZER}.init_args.momentum: torch.optim.sgd.SGD fails"),
        ({OPTIMIZER: {"class_path": "torch.optim.SparseAdam"}}, f"{OPTIMIZER}: torch.optim.sparse_adam.SparseAdam"),
        ({SCHEDULE: {"class_path": "torch.optim.lr_scheduler.LRScheduler"}}, "LRScheduler fails: NotImplementedError"),
        (
            {SCHEDULE: {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 0}}},
            f"{SCHEDULE}: torch.optim.lr_scheduler.StepLR fails: ZeroDivisionError",
        ),
        (
            {f"{BACKBONE}.init_args": {"num_classes": None}},
            f"{BACKBONE}.init_args.num_classes: standins.TinyNet fails with num_classes=None: TypeError",
        ),
        (
            {BACKBONE: {"class_path": "torchvision.models.resnet18", "init_args": {"num_classes": -1}}},
            "model.init_args.backbone.init_args.num_classes: torchvision.models.resnet.resnet18 fails",
        ),
        ({"trainer.devices": None}, "trainer.devices must be a value other than null"),
        ({"trainer.devices": 0, "trainer.accelerator": "cpu"}, "error: trainer.devices: lightning.pytorch"),
        (
            {SCHEDULE: {"class_path": "torch.optim.lr_scheduler.ReduceLROnPlateau"}},
            f"{SCHEDULE} must be a schedule of time",
        ),
        (
            {OPTIMIZER: {"class_path": "torch.optim.Rprop"}, "model.init_args.norm_weight_decay": 0.5},
            "model.init_args.norm_weight_decay must be null for the optimizer Rprop",
        ),
        ({f"{OPTIMIZER}.init_args.momentum": float("nan")}, f"{OPTIMIZER}.init_args.momentum must be finite"),
        ({f"{SCHEDULE}.init_args.warmup": 3}, f"{SCHEDULE}.init_args.warmup must be below the length"),
        ({"trainer.profiler": "no"}, "trainer.profiler: "),
        ({"best_checkpoint.mode": None}, "best_checkpoint.mode must be a value other than null"),
        ({"model.init_args.channels_last": None}, "model.init_args.channels_last must be a value other than null"),
        (
            {"trainer.callbacks": [{"class_path": "lightning.pytorch.callbacks.LearningRateFinder"}]},
            "trainer.callbacks[0]: lightning.pytorch.callbacks.lr_finder.LearningRateFinder fails",
        ),
    ],
)
def test_whatever_making_an_object_raises_names_its_key(refuse, changes, said):
    assert said in refuse(changes)


def test_arguments_inside_of_unions_are_named_without_the_union(refuse):
    message = refuse({"model.init_args.label_smoothing": -1})
    assert message.startswith("knl fit: error: model.init_args.label_smoothing must be a number")


@pytest.mark.parametrize("kind", [RuntimeError, TypeError])
@pytest.mark.parametrize("where", ["knlightning.tasks.ClassificationTask.training_step", "standins.TinyNet.forward"])
def test_faults_in_running_code_keep_their_traceback(empty, monkeypatch, where, kind):
    def broken(*args, **kwargs):
        raise kind("a bug")

    monkeypatch.setattr(where, broken)
    with pytest.raises(kind, match="a bug"):
        main(["fit", "--config", "tiny.yaml"])


class Loud(Callback):
    """A callback of another library."""

    def shout(self):
        raise RuntimeError("loud")


def caught(function):
    try:
        function()
    except Exception as error:
        return error


def test_errors_of_foreign_callbacks_name_them_if_the_configuration_does():
    error = caught(Loud().shout)
    config = {"trainer": {"callbacks": [{"class_path": f"{__name__}.Loud"}]}}
    assert str(locate(error, config)) == f"trainer.callbacks[0]: {__name__}.Loud fails: RuntimeError: loud"
    assert locate(error, {"trainer": {}}) is error


def test_first_cause_counts():
    def fail():
        try:
            raise ArgumentError("lr", 3, "smaller")
        except ArgumentError as error:
            raise ValueError("does not validate") from error

    assert str(locate(caught(fail), {"trainer": {"lr": 3}})) == "trainer.lr must be smaller, got 3"


def test_errors_from_elsewhere_stay():
    error = caught(lambda: SGD([], lr=0.1))
    assert locate(error, {"trainer": {}}) is error
