import re
import sys

import pytest
import standins
from standins import RandomData, TinyNet

from knlightning.callbacks import Throughput, progress
from knlightning.callbacks.progress import Progress
from knlightning.tasks import ClassificationTask


def train(monkeypatch, capsys, terminal, save=None, resume=None, **arguments):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (80, 40))
    trainer = standins.trainer(None, Throughput(), Progress(), max_epochs=2, **arguments, enable_progress_bar=True)
    trainer.fit(ClassificationTask(TinyNet(3)), RandomData(samples=10, batch_size=4), ckpt_path=resume)
    if save:
        trainer.save_checkpoint(save)
    return capsys.readouterr().out


def test_a_log_gets_a_line_an_epoch(monkeypatch, capsys):
    lines = train(monkeypatch, capsys, terminal=False).splitlines()
    values = r"loss=[\d.e-]+, img/s=[\d.]+, val/acc=[\d.]+"
    assert len(lines) == 2
    for number, line in enumerate(lines):
        assert re.fullmatch(rf"Epoch {number}/1 00:0\d, {values}", line), line


def test_a_long_epoch_gets_lines_within(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1)
    lines = train(monkeypatch, capsys, terminal=False).splitlines()
    assert [line.split()[2] for line in lines if "/3 " in line] == ["1/3", "2/3", "3/3"] * 2


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")  # of these random data
def test_a_run_that_goes_on_within_an_epoch_is_shown(tmp_path, monkeypatch, capsys):
    train(monkeypatch, capsys, terminal=False, max_steps=2, save=tmp_path / "a.ckpt")
    (line, *_) = train(monkeypatch, capsys, terminal=False, resume=tmp_path / "a.ckpt").splitlines()
    assert re.match(r"Epoch 0/1 00:0\d, loss=", line), line


def test_a_terminal_gets_bars_of_one_line(monkeypatch, capsys):
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.tqdm_progress.Tqdm.format_interval", lambda t: "00:01")
    printed = train(monkeypatch, capsys, terminal=True)
    drawn = [line for line in re.split(r"[\r\n]", printed) if line.startswith("Epoch 1/1")]
    assert "3/3 " in drawn[-1]
    assert "val/acc=" in drawn[-1]
    assert max(len(line) for line in re.split(r"[\r\n]|\x1b\[A", printed)) <= 80


def test_numbers_are_short():
    assert [progress._short(value) for value in (0.123456, 12.3456, 12345.6, 1e-5, 7, "text")] == [
        "0.123",
        "12.3",
        "12346",
        "1e-05",
        7,
        "text",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_disabled_stays_silent(monkeypatch, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    bar = Progress()
    assert bar.is_enabled == terminal
    bar.disable()
    assert not bar.is_enabled
