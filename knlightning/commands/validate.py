"""Evaluate a checkpoint on the validation data."""

from knlightning.commands.evaluation import EvaluationCLI


class ValidateCLI(EvaluationCLI):
    """`knl validate`."""

    command = "validate"


def main(args: list[str]) -> ValidateCLI:
    """Run `knl validate`.

    Args:
        args: Command line after `validate`.
    """
    return ValidateCLI(args)
