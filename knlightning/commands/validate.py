"""Evaluate a checkpoint on the validation data."""

from knlightning.commands.evaluation import EvaluationCLI


class ValidateCLI(EvaluationCLI):
    """`knl validate`."""

    command = "validate"


main = ValidateCLI
