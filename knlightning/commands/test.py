"""Evaluate a checkpoint on the test data."""

from knlightning.commands.evaluation import EvaluationCLI


class TestCLI(EvaluationCLI):
    """`knl test`."""

    command = "test"


def main(args: list[str]) -> TestCLI:
    """Run `knl test`.

    Args:
        args: Command line after `test`.
    """
    return TestCLI(args)
