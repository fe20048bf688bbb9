"""Functions as commands: arguments, settings of the runs that they start, and answers to wrong ones."""

import pytest

from knlightning.checks import check_number
from knlightning.commands.command import command, split_settings


def test_settings_are_told_from_arguments_by_their_dots():
    args = ["--table", "1", "--data.root", "../x.y", "--out=runs/a.b", "--trainer.max_epochs=3", "-1", "--norm", "a.b"]
    assert split_settings(args) == (
        ["--table", "1", "--out=runs/a.b", "-1", "--norm", "a.b"],
        {"data.root": "../x.y", "trainer.max_epochs": "3"},
    )


def test_a_setting_without_a_value_is_refused():
    with pytest.raises(ValueError, match=r"--data.root needs a value"):
        split_settings(["--table", "1", "--data.root"])


def double(number: int, overrides: dict[str, str] | None = None):
    """Print twice a number.

    Args:
        number: From 0 on.
        overrides: Named beside it.
    """
    check_number("number", number, at_least=0)
    if number == 130:
        raise SystemExit(130)  # as a run does that is interrupted
    print(2 * number, overrides)


def test_arguments_are_those_of_the_function(capsys):
    command(double, "double", ["--number", "4", "--a.b", "c"])
    assert capsys.readouterr().out == "8 {'a.b': 'c'}\n"
    with pytest.raises(SystemExit) as stop:
        command(double, "double", ["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "Print twice a number." in shown
    assert "From 0 on." in shown
    assert "--overrides" not in shown


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["--number", "-1"], 2, "double: error: --number must be a number at least 0, got -1"),
        (["--number", "many"], 2, "many"),
        (["--number", "1", "--wrong", "2"], 2, "wrong"),
        (["--number", "1", "--a.b"], 2, "double: error: --a.b needs a value"),
        (["--number", "130"], 130, "goes on where it was"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(args, status, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command(double, "double", args)
    assert stop.value.code == status
    shown = capsys.readouterr()
    assert message in shown.out + shown.err


def test_arguments_come_from_a_file(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("number: 4")
    command(double, "double", ["--config", str(tmp_path / "a.yaml")])
    command(double, "double", ["--config", str(tmp_path / "a.yaml"), "--number=5"])
    assert capsys.readouterr().out == "8 {}\n10 {}\n"


def same(config: str = "x"):
    print(config)


def test_a_function_may_have_a_config_of_its_own(capsys):
    command(same, "same", ["--config", "y"])
    assert capsys.readouterr().out == "y\n"
