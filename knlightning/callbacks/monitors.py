"""The metrics that callbacks monitor: which value is better, and whether they are ever logged."""

from fnmatch import fnmatch
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping
from lightning.pytorch.utilities import rank_zero_warn

from knlightning.checks import check, check_choice
from knlightning.tasks import Task

LOGGED_BESIDE = (
    *("train/loss_step", "train/images_per_s", "train/seconds", "epoch", "step"),
    *("privacy/epsilon", "privacy/clipped", "privacy/train_acc"),
)
"""What every run may log beside the metrics of its task."""


Mode = Literal["auto", "min", "max"]


def mode_of(monitor: str, mode: Mode) -> Literal["min", "max"]:
    """Say whether the best value of a metric is the smallest or the largest.

    Args:
        monitor: Name of the metric.
        mode: "auto" for "min" if the name ends in "loss", and "max" otherwise.

    Raises:
        ArgumentError: If mode is none of the three.
    """
    check_choice("mode", mode, ("auto", "min", "max"))
    if mode == "auto":
        return "min" if monitor.endswith("loss") else "max"
    return mode


class EarlyStopping(LightningEarlyStopping):
    """Stop a run whose metric gets no better; Lightning's callback, whose mode follows the metric.

    Args:
        monitor: Name of the metric.
        mode: Whether more ("max") or less ("min") is better; "auto" for "min" if the name ends in "loss".
        **kwargs: Further arguments of `lightning.pytorch.callbacks.EarlyStopping`, such as patience, in validations.

    Raises:
        ArgumentError: If mode is none of the three.
    """

    def __init__(self, monitor: str = "val/loss", mode: Mode = "auto", **kwargs: Any) -> None:
        super().__init__(monitor=monitor, mode=mode_of(monitor, mode), **kwargs)


def check_monitors(trainer: Trainer, task: LightningModule) -> None:
    """Check `monitor` of the callbacks, as far as it is known what is logged.

    A run would fail after its first epoch otherwise.

    It is known if the task is one of this package and all callbacks are of this package or Lightning's.

    Raises:
        ArgumentError: If a callback monitors a metric that nothing logs.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined] # set where mypy does not look
    packages = {type(thing).__module__.partition(".")[0] for thing in (task, *callbacks)}
    known = packages <= {"knlightning", "lightning"}
    if trainer.fast_dev_run or not known or not isinstance(task, Task):  # type: ignore[attr-defined] # likewise
        return
    never = _never_validates(trainer)
    stages = ("train",) if never else ("train", "val")
    logged = [f"{stage}/{name}" for stage in reversed(stages) for name in task.metric_names]
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str):
            ok = any(fnmatch(monitor, name) for name in (*logged, *LOGGED_BESIDE))
            hint = f"This run never validates ({never}), so that nothing is in val/." if never else ""
            check(ok, "monitor", monitor, f"a metric that is logged ({', '.join(logged)})", hint)


def warn_without_validation(trainer: Trainer) -> None:
    """Warn if a new run has so few steps that it ends before its first validation, and so has no best checkpoint.

    Args:
        trainer: At the start of the training, when the number of batches is known.
    """
    every, batches = trainer.check_val_every_n_epoch or 1, trainer.num_training_batches
    first = (every - 1) * batches + min(trainer.val_check_batch or batches, batches)
    if trainer.global_step == 0 and 0 <= trainer.max_steps * trainer.accumulate_grad_batches < first:
        rank_zero_warn(
            f"This run never validates: its first validation would come after {first} batches, and max_steps="
            f"{trainer.max_steps} ends it before. So there will be no best checkpoint."
        )


def _never_validates(trainer: Trainer) -> str:
    """Say why a run has no validation, as far as that is known before data are read; nothing, if it has."""
    if not trainer.limit_val_batches:
        return "limit_val_batches=0"
    every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
    if every is not None and epochs is not None and 0 <= epochs < every:
        return f"check_val_every_n_epoch={every} is more than max_epochs={epochs}"
    return ""
