import csv
import time
from types import SimpleNamespace

import pytest
import torch

from knlightning.commands import trials as module
from knlightning.commands.trials import RESULT, Trials, read_result, record, run_trial


@pytest.fixture
def commands(monkeypatch):
    """What would have been run, in place of running it; each epoch's accuracy is a half, that of the test a quarter."""
    given = []

    def stand_in(command):
        def run(args):
            given.append([command, *args])
            metrics = {"val/acc": torch.tensor(0.5), "test/acc": torch.tensor(0.25)}
            trainer = SimpleNamespace(callback_metrics=metrics)
            return SimpleNamespace(trainer=trainer, model=SimpleNamespace(main_metric="acc"))

        return run

    for command in ("fit", "validate", "test"):
        monkeypatch.setattr(module, f"{command.capitalize()}CLI", stand_in(command))
    return given


def test_settings_are_passed_on_to_training_and_evaluation(commands, tmp_path):
    directory = tmp_path / "runs" / "a"
    settings = {"seed_everything": 3, "trainer.max_epochs": "7", "model.init_args.optimizer.init_args.lr": 0.2 / 2**10}
    assert run_trial(directory, tmp_path / "a.yaml", settings) == {"val": 0.5, "test": 0.25}
    line = [f"--config={tmp_path}/a.yaml", "--seed_everything=3", "--trainer.max_epochs=7"]
    line += ["--model.init_args.optimizer.init_args.lr=0.0001953125", f"--run_dir={directory}"]
    line += ["--trainer.enable_progress_bar=false"]
    last = "--ckpt_path=last"
    assert commands == [["fit", *line], ["validate", *line, last], ["test", *line, last]]


def test_the_result_of_other_settings_is_refused(commands, tmp_path):
    config = tmp_path / "a.yaml"
    record(tmp_path, config, {"seed_everything": 3, "trainer.max_epochs": 1}, {"test": 0.5})
    with pytest.raises(
        ValueError, match=r"result.json is of a run that differs in data.batch_size, trainer.max_epochs:"
    ):
        run_trial(tmp_path, config, {"seed_everything": 3, "trainer.max_epochs": 2, "data.batch_size": 4})
    with pytest.raises(ValueError, match="differs in config:"):
        run_trial(tmp_path, tmp_path / "b.yaml", {"seed_everything": 3, "trainer.max_epochs": 1})
    assert run_trial(tmp_path, config, {"trainer.max_epochs": "1", "seed_everything": "3"}) == {"test": 0.5}
    assert not commands


def test_what_is_done_is_in_a_table_and_what_goes_on_is_shown(commands, tmp_path, monkeypatch):
    def diverge(*args):
        raise FloatingPointError("the loss is nan")

    with Trials(tmp_path) as trials:
        assert trials.run(tmp_path / "a", tmp_path / "a.yaml", {}) == {"val": 0.5, "test": 0.25}
        monkeypatch.setattr(module, "run_trial", diverge)
        with pytest.raises(FloatingPointError):
            trials.run(tmp_path / "b", tmp_path / "a.yaml", {})
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "metrics.csv").write_text("step,loss,epoch\n" + "1,2,0\n" * 999 + "9,,7\n")
        trials._running = {tmp_path / "c": time.monotonic() - 120, tmp_path / "d": time.monotonic()}
        board = trials._board()
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = [(row["directory"], row["val"], row["test"], row["diverged"]) for row in csv.DictReader(file)]
    assert rows == [(str(tmp_path / "a"), "0.5", "0.25", "False"), (str(tmp_path / "b"), "0.0", "0.0", "True")]
    assert board.title == "2 done"
    shown = list(zip(*(column.cells for column in board.columns), strict=True))
    assert shown == [(str(tmp_path / "c"), "2", "7"), (str(tmp_path / "d"), "0", "")]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"settings": {}, "accuracies": {"val": 2}}', '{"settings": {"a": 1}}']
)
def test_a_damaged_result_is_named(tmp_path, text):
    (tmp_path / RESULT).write_text(text)
    with pytest.raises(ValueError, match=r"result\.json is damaged"):
        read_result(tmp_path / RESULT)
