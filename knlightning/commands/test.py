"""Evaluate a checkpoint on the test data."""

from knlightning.commands.lightning_cli import KNLightningCLI


class TestCLI(KNLightningCLI):
    """`knl test`."""

    command = "test"

    def execute(self) -> None:
        """Print the scores on the test data."""
        self.trainer.test(**self.trainer_arguments())


def main(args: list[str]) -> TestCLI:
    """Run `knl test`.

    Args:
        args: Command line after `test`.
    """
    return TestCLI(args)
