"""Evaluate a checkpoint on the test data."""

from knlightning.commands.evaluation import EvaluationCLI


class TestCLI(EvaluationCLI):
    """`knl test`."""

    command = "test"


main = TestCLI
