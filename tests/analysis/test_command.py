"""Functions as commands: arguments, settings of the runs that they start, and answers to wrong ones."""

from pathlib import Path

import pytest

from knlightning.analysis import compare, curves, loading, private_cost, private_digits, scenes
from knlightning.analysis.command import command, split_settings


def test_settings_are_told_from_arguments_by_their_dots():
    args = ["--table", "1", "--data.root", "../x.y", "--out=runs/a.b", "--trainer.max_epochs=3", "-1", "--norm", "a.b"]
    assert split_settings(args) == (
        ["--table", "1", "--out=runs/a.b", "-1", "--norm", "a.b"],
        {"data.root": "../x.y", "trainer.max_epochs": "3"},
    )


def test_a_setting_without_a_value_is_refused():
    with pytest.raises(ValueError, match=r"--data.root needs a value"):
        split_settings(["--table", "1", "--data.root"])


def double(number: int, overrides: dict[str, str] | None = None) -> None:
    """Print twice a number.

    Args:
        number: from 0 on.
        overrides: named beside it.
    """
    if number < 0:
        raise ValueError(f"--number must not be negative, got {number}")
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
    assert "from 0 on." in shown
    assert "--overrides" not in shown


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["--number", "-1"], 2, "double: error: --number must not be negative, got -1"),
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


@pytest.mark.parametrize(
    ("module", "args", "message"),
    [
        (compare, ["--batch_sizes", "[2]"], "--epochs must have one number for each of the 1 batch sizes"),
        (scenes, ["--seeds", "0"], "seeds must be at least 1"),
        (private_digits, ["--seeds", "0"], "--seeds must be at least 1"),
        (private_cost, ["--rounds", "0"], "--rounds must be at least 1"),
        (loading, ["--rounds", "0"], "--rounds must be at least 1"),
        (curves, ["--runs", "[nowhere]"], "nowhere"),
    ],
)
def test_every_analysis_answers_so(module, args, message, capsys, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        module.main(args)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
