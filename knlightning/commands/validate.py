"""Evaluate a checkpoint on the validation data."""

from knlightning.commands.lightning_cli import KNLightningCLI


class ValidateCLI(KNLightningCLI):
    """`knl validate`."""

    command = "validate"

    def execute(self) -> None:
        """Print the scores on the validation data."""
        self.trainer.validate(**self.trainer_arguments())


def main(args: list[str]) -> ValidateCLI:
    """Run `knl validate`.

    Args:
        args: Command line after `validate`.
    """
    return ValidateCLI(args)
