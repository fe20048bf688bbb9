from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from knlightning.commands.evaluation import EvaluationCLI
from knlightning.commands.test import TestCLI
from knlightning.commands.validate import ValidateCLI


@pytest.mark.parametrize("command", [TestCLI, ValidateCLI])
def test_commands_are_methods_of_the_trainer(command):
    assert issubclass(command, EvaluationCLI)
    assert callable(getattr(Trainer, command.command))
    assert Path(f"knlightning/commands/{command.command}.py").name == f"{command.__module__.rpartition('.')[2]}.py"
