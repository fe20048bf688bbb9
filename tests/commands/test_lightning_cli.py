import inspect
import os

import pytest
from commands.runs import help_text, refused
from lightning.pytorch import Callback, LightningDataModule, LightningModule

from knlightning import callbacks, data, tasks
from knlightning.checks import ArgumentError
from knlightning.commands.main import main


@pytest.mark.parametrize(
    ("command", "args", "looked"),
    [
        ("fit", ["--ckpt_path", "last"], "runs/tiny/*"),
        ("fit", ["--ckpt_path", "best", "--run_dir", "there"], "there/checkpoints/best.ckpt"),
        ("fit", ["--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt"),
        ("predict", ["--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt"),
    ],
)
def test_missing_checkpoint_is_an_error_before_anything_else(empty, capsys, command, args, looked):
    assert looked in refused(capsys, command, "--config", "tiny.yaml", *args)
    assert os.listdir(empty) == ["tiny.yaml"]


def test_same_configuration_shows_no_differences(folder, capsys):
    main(["test", "--config", "tiny.yaml", "--ckpt_path", "last"])
    assert "->" not in capsys.readouterr().out


def test_checkpoint_of_another_network_is_an_error_without_traceback(folder, capsys):
    args = ["--model.backbone", "torch.nn.Flatten"]
    message = refused(capsys, "test", "--config", "tiny.yaml", "--ckpt_path", "best", *args)
    assert "backbone.head.weight" in message


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config", "tiny.yaml", "--data.batchsize", "3"], "batchsize"),
        (["--config", "tiny.yaml", "--trainer.epochs", "3"], "epochs"),
        (["--config", "tiny.yaml", "--trainer.max_epochs", "many"], "max_epochs"),
        (["--config", "tiny.yaml", "--model", "no.such.Task"], "no.such.Task"),
        (["--config", "tiny.yaml", "--data.batch_size", "0"], "batch_size must be a whole number at least 1, got 0"),
        (["--config", "tiny.yaml", "--model.label_smoothing", "2"], "label_smoothing"),
        (["--config", "tiny.yaml", "--last_checkpoint.every_n_steps", "0"], "every_n_steps"),
        (["--config", "tiny.yaml", "--best_checkpoint.mode", "most"], "mode"),
        (["--config", "tiny.yaml", "--model.backbone.num_classes", "7"], "num_classes to 10"),
        (["--config", "tiny.yaml", "--trainer.max_epochs", "-1"], "the trainer's max_epochs"),
        (["--config", "tiny.yaml", "--trainer.callbacks+", "Timer"], "cannot be written into config.yaml: "),
        ([], "model"),
    ],
)
def test_faults_of_the_configuration(empty, capsys, args, said):
    assert said in refused(capsys, "fit", *args)


@pytest.mark.parametrize(
    ("where", "name", "args", "said"),
    [
        (
            "standins.TinyNet.forward",
            "dropout_p",
            ["--model.backbone.dropout_p=0.25"],
            "model.init_args.backbone.init_args.dropout_p must be another, got 0.25",
        ),
        (
            "lightning.pytorch.callbacks.EarlyStopping.setup",
            "patience",
            [
                "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping",
                "--trainer.callbacks.monitor=val/loss",
                "--trainer.callbacks.patience=7",
            ],
            "trainer.callbacks[0].init_args.patience must be another, got 7",
        ),
    ],
)
def test_wrong_arguments_are_named_by_their_keys(empty, monkeypatch, capsys, where, name, args, said):
    """Whatever object raises the error, while it is made or later."""

    def refused_later(self, *args, **kwargs):
        raise ArgumentError(name, 0.25 if name == "dropout_p" else 7, "another")

    monkeypatch.setattr(where, refused_later)
    assert f"knl fit: error: {said}" in refused(capsys, "fit", "--config", "tiny.yaml", *args)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_help_of_a_subcommand_begins_with_what_matters(capsys, command):
    lines = help_text(capsys, command, "--help")  # twice: all of it
    # the lists of known subclasses grow with what is imported, so that line numbers say nothing
    head = lines[: next(i for i, line in enumerate(lines) if line.lstrip().startswith("--trainer."))]
    for option in ("--config", "--run_dir", "--ckpt_path", "--model", "--data", "--best_checkpoint.monitor"):
        assert any(option in line for line in head)


def test_no_argument_of_ours_is_any_function():
    """A configuration can name what is called in no place but these; README.md says so."""
    found = set()
    for package in (callbacks, data, tasks):
        for name in package.__all__:
            kind = getattr(package, name)
            if isinstance(kind, type) and issubclass(kind, LightningModule | LightningDataModule | Callback):
                parameters = inspect.signature(kind, eval_str=True).parameters.values()
                found |= {parameter.name for parameter in parameters if "Callable" in str(parameter.annotation)}
    assert found <= {"optimizer", "lr_scheduler"}
