"""Train a network; resume with --ckpt_path last."""

from contextlib import suppress
from pathlib import Path

import torch
from lightning.pytorch.loggers import Logger

from knlightning.callbacks import BestCheckpoint, MetricsCSV, TensorBoardLog
from knlightning.commands.lightning_cli import KNLightningCLI
from knlightning.commands.output import say
from knlightning.protocols import ChecksBefore
from knlightning.run_directory import checkpoint_in, holds_checkpoints


class FitCLI(KNLightningCLI):
    """`knl fit`."""

    command = "fit"
    starts_runs = True

    def without_checkpoint(self, launched: bool) -> None:
        """Refuse to begin anew where a run lies already."""
        if self.run_dir and holds_checkpoints(self.run_dir) and not launched:
            raise ValueError(
                f"--run_dir {self.run_dir} holds the checkpoints of a run: go on with it by --ckpt_path last, or choose"
                " another directory"
            )

    def use_published(self, weights: Path) -> None:
        """Refuse weights without a run."""
        raise ValueError(
            f"--ckpt_path {weights} holds weights alone, and no run that could go on: use it with knl validate, test,"
            " predict or export"
        )

    def default_loggers(self) -> list[Logger]:
        """Log into the run directory."""
        assert self.run_dir is not None
        return [TensorBoardLog(self.run_dir, self.first_step), MetricsCSV(self.run_dir, self.first_step)]

    def execute(self) -> None:
        """Train, and say how well it went."""
        self._check()
        self.trainer.fit(**self.trainer_arguments())
        if not self.trainer.fast_dev_run:  # type: ignore[attr-defined] # set where mypy does not look
            say(self._summary())

    def how_to_go_on(self) -> str:
        """Say how an interrupted run goes on."""
        if self.run_dir and checkpoint_in(self.run_dir, "last").is_file():
            return f" Go on with: knl fit --config {self.run_dir}/config.yaml --ckpt_path last"
        return " There is no checkpoint yet to go on from."

    def _check(self) -> None:
        """Let callbacks refuse a run before it reads any data."""
        try:
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined] # set where mypy does not look
                if isinstance(callback, ChecksBefore):
                    callback.check_before(self.trainer, self.model, self.datamodule)
        except ValueError:
            if self.run_dir is not None:
                with suppress(OSError):  # unless it is empty
                    self.run_dir.rmdir()
            raise

    def _summary(self) -> str:
        """Say where the run lies, how well it went, and what to do next."""
        lines = [f"Run:        {self.run_dir}"]
        best: BestCheckpoint = self.config_init.best_checkpoint
        if best.best_model_path:
            epoch = torch.load(best.best_model_path, map_location="meta", weights_only=True)["epoch"]
            lines.append(f"Best:       {best.monitor} {best.best_model_score:.4f}, in epoch {epoch}")
            lines.append(f"Test it:    knl test --config {self.run_dir}/config.yaml --ckpt_path best")
        lines.append(f"Look at it: tensorboard --logdir {self.run_dir}")
        return "\n".join(lines)


def main(args: list[str]) -> FitCLI:
    """Run `knl fit`.

    Args:
        args: Command line after `fit`.
    """
    return FitCLI(args)
