import pytest
from commands.runs import refused
from jsonargparse import ArgumentParser

from knlightning.commands.hints import did_you_mean, hint
from knlightning.commands.main import main


@pytest.fixture
def parser():
    parser = ArgumentParser()
    for name in ("--trainer.max_epochs", "--trainer.precision", "--data", "--run_dir"):
        parser.add_argument(name)
    return parser


@pytest.mark.parametrize(
    ("message", "meant"),
    [
        ("model: class_path 'knlightning.models.knresnet8': Option 'nrm' is not accepted", "norm"),
        ("data: class_path 'knlightning.data.DigitsDataModule': Option 'bach_size' is not accepted", "batch_size"),
        ("unrecognized arguments: --trainer.precison 16", "trainer.precision"),
        ("Group 'trainer' does not accept option 'max_epocs'", "trainer.max_epochs"),
        ("Option 'trianer.max_epochs' is not accepted", "trainer.max_epochs"),
        ("model.norm must be one of 'batch', 'kernel'; got kernl", "kernel"),
    ],
)
def test_what_may_be_meant(parser, message, meant):
    assert hint(message, parser) == f" Did you mean {meant}?"


@pytest.mark.parametrize(
    "message",
    [
        "data: class_path 'no.such.thing': Option 'norm' is not accepted",
        "unrecognized arguments: --xyz",
        "data.batch_size must be int; got two",
        "File does not exist",
    ],
)
def test_nothing_is_guessed_from_what_is_nothing_like_it(parser, message):
    assert hint(message, parser) == ""


def test_known_names_are_compared():
    assert did_you_mean("xyz", ["batch", "kernel"]) == ""


@pytest.mark.usefixtures("empty")
def test_commands_say_it(capsys):
    assert "Did you mean trainer.precision?" in refused(capsys, "fit", "--config=tiny.yaml", "--trainer.precison=16")
    with pytest.raises(SystemExit):
        main(["fitt"])
    assert "there is no command fitt. Did you mean fit?" in capsys.readouterr().err
