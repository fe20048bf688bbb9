import pytest
from commands.runs import refused
from jsonargparse import ArgumentParser

from knlightning.commands.hints import did_you_mean, explained
from knlightning.commands.main import main


@pytest.fixture
def parser():
    parser = ArgumentParser()
    for name in ("--trainer.max_epochs", "--trainer.precision", "--data", "--run_dir"):
        parser.add_argument(name)
    return parser


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "model: class_path 'knlightning.models.knresnet8': Option 'nrm' is not accepted",
            "model.nrm: knresnet8 has no such argument. Did you mean norm?",
        ),
        (
            "data: class_path 'no.such.thing': Option 'norm' is not accepted",
            "data.norm: thing has no such argument.",
        ),
        (
            "model.optimizer: Type Callable expects a function: Option 'lrr' is not accepted."
            " Got value: Namespace(class_path='torch.optim.Adam', init_args=Namespace(lrr='3'))",
            "model.optimizer.lrr: Adam has no such argument. Did you mean lr?",
        ),
        (
            "unrecognized arguments: --trainer.precison 16",
            "there is no option trainer.precison. Did you mean trainer.precision?",
        ),
        ("unrecognized arguments: --dta.root x", "there is no option dta.root. Did you mean data.root?"),
        ("unrecognized arguments: --xyz", "there is no option xyz."),
        (
            "Group 'trainer' does not accept option 'max_epocs'",
            "there is no option trainer.max_epocs. Did you mean trainer.max_epochs?",
        ),
        (
            "Option 'trianer.max_epochs' is not accepted",
            "there is no option trianer.max_epochs. Did you mean trainer.max_epochs?",
        ),
        (
            "model.norm must be one of 'batch', 'kernel'; got kernl",
            "model.norm must be one of 'batch', 'kernel'; got kernl. Did you mean kernel?",
        ),
        ("data.batch_size must be int; got two", "data.batch_size must be int; got two"),
        ("File does not exist", "File does not exist"),
    ],
)
def test_what_may_be_meant_is_said(parser, message, said):
    assert explained(message, parser) == said


def test_known_names_are_compared():
    assert did_you_mean("xyz", ["batch", "kernel"]) == ""


@pytest.mark.usefixtures("empty")
def test_commands_say_it(capsys):
    assert "Did you mean trainer.precision?" in refused(capsys, "fit", "--config=tiny.yaml", "--trainer.precison=16")
    with pytest.raises(SystemExit):
        main(["fitt"])
    assert "there is no command fitt. Did you mean fit?" in capsys.readouterr().err
