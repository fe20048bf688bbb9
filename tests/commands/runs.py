"""What tests of commands ask of runs and of messages."""

import csv

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from knlightning.commands.main import main


def refused(capsys, *args):
    """Run a command that fails by the user's fault, and return what it says."""
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def rows(run):
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(run, name):
    return [(int(row["step"]), float(row[name])) for row in rows(run) if row[name]]


def scalars(run):
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return events


def accuracy(capsys):
    """Read the accuracy from the scores that are printed, with four digits."""
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "/acc " in line]
    return float(line.split()[1])


def help_text(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main([*args, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out.splitlines()
