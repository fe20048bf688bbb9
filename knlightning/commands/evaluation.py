"""What `knl validate` and `knl test` share."""

from knlightning.commands.lightning_cli import KNLightningCLI
from knlightning.commands.output import say


class EvaluationCLI(KNLightningCLI):
    """A command that evaluates; its name is that of the trainer's method."""

    def execute(self) -> None:
        """Evaluate, and print the scores."""
        (scores,) = getattr(self.trainer, self.command)(**self.trainer_arguments(), verbose=False)
        width = max(map(len, scores), default=0)
        say("\n".join(f"{name:{width}}  {value:.4f}" for name, value in scores.items()))
