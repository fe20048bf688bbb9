import re
from pathlib import Path

import pytest
import torch

from knlightning.checks import ArgumentError
from knlightning.commands.arguments import find_argument, flatten, plain_errors, walk

CONFIG = {
    "seeds": 0,
    "run_dir": "here",
    "model": {"class_path": "Task", "init_args": {"backbone": {"init_args": {"dropout_p": 1.5, "eps": float("nan")}}}},
    "trainer": {
        "max_epochs": -1,
        "callbacks": [{"init_args": {"decay": 2}}, {"init_args": {"decay": 3, "shape": [1, 2]}}],
    },
    "data": {"init_args": {"dropout_p": 0.5, "decay": 3}},
}


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("seeds", 0, "--seeds"),
        ("run_dir", Path("here"), "--run_dir"),
        ("max_epochs", -1, "trainer.max_epochs"),
        ("dropout_p", 1.5, "model.init_args.backbone.init_args.dropout_p"),
        ("eps", float("nan"), "model.init_args.backbone.init_args.eps"),
        ("decay", 2, "trainer.callbacks[0].init_args.decay"),
        ("shape", (1, 2), "trainer.callbacks[1].init_args.shape"),
        ("decay", 3, "trainer.callbacks[1].init_args.decay or data.init_args.decay"),  # either may be meant
        ("decay", 4, "decay"),  # computed, perhaps
        ("backbone", "of another kind", "model.init_args.backbone"),  # there is no other
        ("rank", 0, "rank"),
    ],
)
def test_an_argument_is_found_by_its_name_and_value(name, value, found):
    error = find_argument(ArgumentError(name, value, "another", "Change it."), CONFIG)
    assert str(error) == f"{found} must be another, got {value!r}. Change it."


def test_keys_at_all_depths():
    assert list(walk({"a": {"b": [1, {"c": 2}]}})) == [
        ("a", {"b": [1, {"c": 2}]}),
        ("a.b", [1, {"c": 2}]),
        ("a.b[0]", 1),
        ("a.b[1]", {"c": 2}),
        ("a.b[1].c", 2),
    ]
    assert flatten({"a": {"b": [1, {"c": 2}], "d": None}, "e": {}}) == {"a.b": [1, {"c": 2}], "a.d": None}


@pytest.mark.parametrize("error", [ValueError("bad"), OSError("bad"), ArithmeticError("bad")])
def test_faults_of_the_user_become_a_line_and_a_status(error, capsys):
    with pytest.raises(SystemExit) as stop, plain_errors("knl x"):
        raise error
    assert stop.value.code == 2
    assert capsys.readouterr().err == "knl x: error: bad\n(KNL_DEBUG=1 shows where)\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), r"The memory does not suffice \(MemoryError\)\. .*eval_window"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            "does not suffice .*9 bytes",
        ),
        (torch.OutOfMemoryError("CUDA out of memory."), "does not suffice .*CUDA out of memory"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "has died .number 7 is killed"),
    ],
)
def test_what_runs_out_or_is_killed_becomes_a_line(error, message, capsys):
    with pytest.raises(SystemExit) as stop, plain_errors("knl x"):
        raise error
    assert stop.value.code == 2
    assert re.match(f"knl x: error: .*{message}", capsys.readouterr().err)


def test_an_interrupt_becomes_a_status():
    with pytest.raises(SystemExit) as stop, plain_errors("knl x"):
        raise KeyboardInterrupt
    assert stop.value.code == 130


def test_traceback_on_demand(monkeypatch):
    monkeypatch.setenv("KNL_DEBUG", "1")
    with pytest.raises(ValueError, match="bad"), plain_errors("knl x"):
        raise ValueError("bad")
