"""Whether the metrics that callbacks monitor are ever logged: a run would fail after its first epoch otherwise."""

from fnmatch import fnmatch

from lightning.pytorch import LightningModule, Trainer

from knlightning.checks import check
from knlightning.tasks import Task

LOGGED_BESIDE = ("train/loss_step", "train/images_per_s", "privacy/epsilon", "epoch", "step")
"""What every run may log beside the metrics of its task."""


def check_monitors(trainer: Trainer, task: LightningModule) -> None:
    """Check `monitor` of the callbacks, as far as it is known what is logged.

    It is known if the task is one of this package and all callbacks are of this package or Lightning's.

    Args:
        trainer: With the callbacks.
        task: The task.

    Raises:
        ArgumentError: If a callback monitors a metric that nothing logs.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined] # set where mypy does not look
    known = all(_is_known(thing) for thing in (task, *callbacks))
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


def _never_validates(trainer: Trainer) -> str:
    """Say why a run has no validation, as far as that is known before data are read; nothing, if it has."""
    if not trainer.limit_val_batches:
        return "limit_val_batches=0"
    every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
    if every is not None and epochs is not None and 0 <= epochs < every:
        return f"check_val_every_n_epoch={every} is more than max_epochs={epochs}"
    return ""


def _is_known(thing: object) -> bool:
    return type(thing).__module__.partition(".")[0] in ("knlightning", "lightning")
