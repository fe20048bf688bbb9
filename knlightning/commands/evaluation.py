"""What `knl validate` and `knl test` share."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from knlightning.callbacks.evaluation import EvaluationFiles
from knlightning.commands.early import USAGES
from knlightning.commands.lightning_cli import KNLightningCLI
from knlightning.commands.output import say


class EvaluationCLI(KNLightningCLI):
    """A command that evaluates; its name is that of the trainer's method, and of the folder that it writes in a run."""

    usage = USAGES["test"]
    own_arguments = ("out",)

    def add_own_arguments(self, parser: LightningArgumentParser) -> None:
        """Add where to write."""
        parser.add_argument(
            "--out",
            type=str | None,
            default=None,
            help=f"Directory for the results, new or of the same command; null for {self.command} in the run.",
        )

    def check_own_arguments(self) -> None:
        """Refuse to replace a folder that holds something else."""
        out = self.config.out and Path(self.config.out)
        if out and out.exists() and not (out / f"{self.command}.json").is_file() and not _is_empty(out):
            raise ValueError(
                f"--out {out} must be a new or an empty directory, or one of an earlier knl {self.command}"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, with what writes the results, if there is a place for them."""
        trainer = super().instantiate_trainer(**kwargs)
        self.out = Path(self.config.out) if self.config.out else self.run_dir and self.run_dir / self.command
        if self.out:
            trainer.callbacks.append(EvaluationFiles(self.out))  # type: ignore[attr-defined] # as in Lightning's docs
        return trainer

    def execute(self) -> None:
        """Evaluate, print the scores, and say where the rest lies."""
        by_loader = getattr(self.trainer, self.command)(**self.trainer_arguments(), verbose=False)
        scores = {name: value for scores in by_loader for name, value in scores.items()}
        width = max(map(len, scores), default=0)
        for name, value in scores.items():
            say(f"{name:{width}}  {value:.4f}")
        say(
            f"Results: {self.out}" if self.out else "There is no run to write results into: --out DIRECTORY keeps them."
        )


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
