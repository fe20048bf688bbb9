"""Train a network; resume with --ckpt_path last."""

import os
import shlex
import signal
import subprocess
from contextlib import nullcontext
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from knlightning.callbacks import BestCheckpoint, MetricsCSV, TensorBoardLog
from knlightning.callbacks.run_config import JOB_VARIABLE
from knlightning.callbacks.signals import Stopped
from knlightning.checkpoint_files import read_checkpoint, stored_config
from knlightning.commands.arguments import as_list
from knlightning.commands.lightning_cli import KNLightningCLI
from knlightning.commands.output import say
from knlightning.protocols import ChecksBefore
from knlightning.run_directory import checkpoint_in, holds_checkpoints, numbered_runs


class FitCLI(KNLightningCLI):
    """`knl fit`."""

    command = "fit"
    starts_runs = True
    trains = True

    def settle_checkpoint(self, ckpt_path: str | None) -> str | None:
        """Go on with a run that is there, if "auto" asks for it, or if SLURM starts the same job again."""
        if ckpt_path != "auto" and (ckpt_path is not None or not self._is_requeued()):
            return ckpt_path
        runs = numbered_runs(self._run_name) if self.run_dir is None else [self.run_dir]
        if any(checkpoint_in(run, "last").is_file() for run in runs):
            return "last"
        return None

    def without_checkpoint(self, launched: bool) -> None:
        """Refuse to begin anew where a run lies already."""
        if self.run_dir and holds_checkpoints(self.run_dir) and not launched:
            raise ValueError(
                f"--run_dir {self.run_dir} holds the checkpoints of a run: go on with it by --ckpt_path last (or auto,"
                " which starts a run or goes on with it), or choose another directory"
            )

    def use_published(self, weights: str) -> None:
        """Refuse weights without a run."""
        raise ValueError(
            f"--ckpt_path {weights} holds weights alone, and no run that could go on: begin a new one with them by"
            " --model.init_from"
        )

    def loggers(self, configured: Any) -> list[Logger] | bool:
        """Log into the run directory, for TensorBoard and into metrics.csv, beside the logs of the configuration."""
        assert self.run_dir is not None
        if configured is False:
            return False
        others = [] if configured in (None, True) else as_list(configured)
        has_tensorboard = any(isinstance(logger, TensorBoardLogger) for logger in others)
        ours = [] if has_tensorboard else [TensorBoardLog(self.run_dir, self.first_step)]
        return [*ours, *others, MetricsCSV(self.run_dir, self.first_step)]

    def execute(self) -> None:
        """Train, and say how well it went."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined] # set where mypy does not look
            if isinstance(callback, ChecksBefore):  # may refuse a run before it reads any data
                callback.check_before(self.trainer, self.model, self.datamodule)
        try:
            with self.peers.watched(self.how_to_go_on) if self.peers else nullcontext():
                self.trainer.fit(**self.trainer_arguments())
        except Stopped as stop:
            if stop.signum == signal.SIGUSR1 and self.trainer.is_global_zero:
                self._requeue()
            raise
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined] # set where mypy does not look
            self.claim.discard(with_content=True)
        elif self.claim.made and self.trainer.global_step == self.first_step:
            self.claim.discard(with_content=True)
            say("Nothing was left to train: no run was made.")
        else:
            say(self._summary())

    def how_to_go_on(self) -> str:
        """Say how an interrupted run goes on."""
        if self.run_dir and checkpoint_in(self.run_dir, "last").is_file():
            return f" Go on with: knl fit --config {shlex.quote(str(self.run_dir))}/config.yaml --ckpt_path last"
        return " There is no checkpoint yet to go on from."

    def _is_requeued(self) -> bool:
        """Say whether SLURM has started the same job before, which has left a checkpoint in the run directory."""
        if self.run_dir is None or not SLURMEnvironment.detect() or not checkpoint_in(self.run_dir, "last").is_file():
            return False
        if int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0:
            return True
        stored = read_checkpoint(checkpoint_in(self.run_dir, "last"), map_location="meta")
        return stored_config(stored, "job") == os.environ.get(JOB_VARIABLE)

    def _requeue(self) -> None:
        """Have SLURM start the job again, if it runs there."""
        plugins = as_list(self.config_init.trainer.plugins)
        if not SLURMEnvironment.detect() or any(not getattr(plugin, "auto_requeue", True) for plugin in plugins):
            return
        job = os.environ.get(JOB_VARIABLE, "")
        if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
            job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
        try:
            subprocess.run(["scontrol", "requeue", job], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            say(f"SLURM does not start job {job} again ({error}): submit it again.")

    def _summary(self) -> str:
        """Say where the run lies, how well it went, and what to do next."""
        run = shlex.quote(str(self.run_dir))
        lines = [f"Run:        {self.run_dir}"]
        best: BestCheckpoint = self.config_init.best_checkpoint
        best_weights = f"--config {run}/config.yaml --ckpt_path best"
        if best.best_model_path:
            epoch = read_checkpoint(best.best_model_path, map_location="meta")["epoch"]
            lines.append(f"Best:       {best.monitor} {best.best_model_score:.4f}, in epoch {epoch}")
            lines.append(f"Test it:    knl test {best_weights}")
            lines.append(f"Use it:     knl predict {best_weights} --data.predict_dir IMAGES")
        lines.append(f"Look at it: tensorboard --logdir {run}")
        return "\n".join(lines)


main = FitCLI
