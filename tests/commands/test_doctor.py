import os

import pytest

from knlightning.callbacks.stopwatch import Stopwatch
from knlightning.commands.doctor import machine
from knlightning.commands.main import main
from knlightning.nn import cpu_passes


def test_the_machine_is_described(monkeypatch):
    lines = dict(line.split(maxsplit=1) for line in machine().splitlines())
    assert "torch 2." in lines["Packages"]
    assert "JPEG" in lines["Images"]
    assert "GiB free" in lines["Disk"]
    assert lines["KNConv"] == "C++ passes on CPUs"
    monkeypatch.setattr(cpu_passes, "library", lambda: None)
    assert "no C++ compiler: plain operations of torch on CPUs" in machine()


@pytest.mark.usefixtures("empty")
def test_a_configuration_is_tried_and_nothing_written(capsys, monkeypatch):
    monkeypatch.setattr(Stopwatch.__init__, "__defaults__", (0.01,))
    main(["doctor", "--config", "tiny.yaml"])
    printed = capsys.readouterr().out
    assert "Best:    the epoch with the highest val/acc" in printed
    assert " ms a batch, " in printed
    assert "Network: " in printed
    assert "GiB at most" in printed
    assert os.listdir() == ["tiny.yaml"]
