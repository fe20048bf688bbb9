"""Search of a batch size or a learning rate before a run; what is found becomes a part of its configuration."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks as lightning_callbacks
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch.optim import Optimizer

from knlightning.callbacks.run_config import RunConfig
from knlightning.checks import ArgumentError
from knlightning.internals.lightning import unbiased_losses
from knlightning.run_directory import replacing
from knlightning.tasks import Task

SKIPPED = 10
"""First steps of a range test that do not count: their losses are means of too few batches."""


class BatchSizeFinder(lightning_callbacks.BatchSizeFinder):
    """Train a run with the largest batches that fit into memory; Lightning's callback, whose result is kept.

    `config.yaml` has the batch size that was found, and no longer the callback. A run that goes on does not search.

    Args:
        **kwargs: Arguments of `lightning.pytorch.callbacks.BatchSizeFinder`, such as max_val.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search."""
        if trainer.ckpt_path is None:
            super().on_fit_start(trainer, pl_module)
            _keep(self, trainer, ("data", "init_args", "batch_size"), self.optimal_batch_size)


class LearningRateFinder(lightning_callbacks.LearningRateFinder):
    """Train a run with a learning rate from a range test; Lightning's callback, whose result is kept.

    The learning rate grows from step to step. A tenth of the one with the lowest loss is what is taken: it is a first
    guess, which `knl sweep-lr` does better. `config.yaml` has it, and no longer the callback; `learning_rate.png` in
    the run directory shows the losses. A run that goes on does not search.

    Args:
        **kwargs: Arguments of `lightning.pytorch.callbacks.LearningRateFinder`, such as num_training_steps.

    Source: range test of Smith (WACV 2017).
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(update_attr=False, **kwargs)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search.

        Raises:
            ArgumentError: If the steps are too few for a guess.
        """
        if trainer.ckpt_path is not None:
            return
        super().on_fit_start(trainer, pl_module)
        if self.optimal_lr is None:  # a trial of a few batches
            return
        results = self.optimal_lr.results
        results["loss"] = unbiased_losses(results["loss"])
        rates, losses = results["lr"][SKIPPED:], results["loss"][SKIPPED:]
        if not losses:
            hint = "The run must be as long."
            raise ArgumentError("num_training_steps", len(results["lr"]), f"well above {SKIPPED}", hint)
        found = rates[losses.index(min(losses))] / 10
        assert isinstance(pl_module, Task)
        pl_module.make_optimizer = partial(_with_learning_rate, pl_module.make_optimizer, found)
        trainer.strategy.setup_optimizers(trainer)  # with a schedule from this learning rate on
        _keep(self, trainer, ("model", "init_args", "optimizer", "init_args", "lr"), found)
        self._draw(Path(trainer.default_root_dir) / "learning_rate.png", found)

    @rank_zero_only
    def _draw(self, path: Path, found: float) -> None:
        from matplotlib.figure import Figure  # slow to import

        assert self.optimal_lr is not None
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        self.optimal_lr.plot(ax=axes)
        axes.axvline(found, color="red", linewidth=1, label=f"found: {found:.2g}")
        axes.legend()
        axes.set(xlabel="learning rate (logarithmic)" if axes.get_xscale() == "log" else "learning rate", ylabel="loss")
        axes.grid(alpha=0.3)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=120, format="png")


def _with_learning_rate(make: Callable[[Any], Optimizer], learning_rate: float, params: Any) -> Optimizer:
    optimizer = make(params)
    for settings in (optimizer.defaults, *optimizer.param_groups):
        settings["lr"] = learning_rate
    return optimizer


def _keep(finder: Any, trainer: Trainer, keys: Sequence[str], value: Any) -> None:
    """Write what was found into the configuration of the run, from which the finder disappears."""
    rank_zero_info(f"{type(finder).__name__}: {keys[-1]} {value:g}")
    for callback in trainer.callbacks:  # type: ignore[attr-defined] # set where mypy does not look
        if isinstance(callback, RunConfig):
            every = callback.config["trainer"]["callbacks"]
            others = [one for one in every if one["class_path"].rpartition(".")[2] != type(finder).__name__]
            callback.change(("trainer", "callbacks"), others)
            callback.change(keys, value)
