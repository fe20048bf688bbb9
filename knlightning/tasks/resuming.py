"""How a run that goes on takes up its optimizer and its schedule: what was changed counts, all else is restored."""

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from knlightning.internals.lightning import num_epochs_trained, num_steps_left
from knlightning.tasks.schedules import RunLR

STATE_OPTIONS = ("amsgrad", "centered", "momentum")
"""Options of torch's optimizers that decide, by being 0 (or False) or not, which moments are kept."""


@dataclass
class Stored:
    """What a checkpoint holds of the optimizer and the schedule.

    Attributes:
        configured: What `configuration` returned when the run was started; empty if the checkpoint does not say.
        schedules: States of the schedules.
        optimizer_states: States of the optimizers.
        other_optimizer: Whether they are of no use for the optimizer of now.
    """

    configured: dict[str, Any]
    schedules: list[dict[str, Any]]
    optimizer_states: list[dict[str, Any]]
    other_optimizer: bool = False


def take_from(checkpoint: dict[str, Any]) -> Stored:
    """Take the states out of a checkpoint of which Lightning would restore those of the schedules blindly."""
    configured = checkpoint.get("configured", {})
    if configured:  # earlier checkpoints say the interval only there
        hparams = checkpoint.get("hyper_parameters", {})
        configured = {"interval": hparams.get("lr_scheduler_interval", "epoch"), **configured}
    schedules = checkpoint.get("lr_schedulers", [])
    checkpoint["lr_schedulers"] = []
    return Stored(configured, schedules, checkpoint.get("optimizer_states", []))


def apply_to_callbacks(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let the trainer's max_time count for each job of a chain, and let the patience of early stopping be the new one.

    Args:
        trainer: Its callbacks are about to be restored.
        checkpoint: Checkpoint of a run; the states of its callbacks are changed.
    """
    states = checkpoint.get("callbacks", {})
    states.pop(Timer.__qualname__, None)
    for callback in trainer.callbacks:  # type: ignore[attr-defined] # set where mypy does not look
        if isinstance(callback, EarlyStopping) and callback.state_key in states:
            states[callback.state_key]["patience"] = callback.patience


def configuration(optimizer: Optimizer, scheduler: LRScheduler | None, interval: str) -> dict[str, Any]:
    """Describe a new optimizer and its new schedule in plain values, for checkpoints.

    Args:
        optimizer: Before its first step.
        scheduler: Before its first step; None for a constant learning rate.
        interval: Unit of time of the schedule, "epoch" or "step".
    """
    return copy.deepcopy(
        {
            "optimizer": type(optimizer).__name__,
            "sizes": [len(group["params"]) for group in optimizer.param_groups],
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
            "scheduler": type(scheduler).__name__ if scheduler else None,
            "schedule": scheduler.state_dict() if scheduler else {},
            "interval": interval,
            "length": None,
        }
    )


def compare_optimizers(stored: Stored, configured: dict[str, Any], optimizer: Optimizer) -> None:
    """Compare the optimizer with that of a checkpoint. Another one begins without its moments, with a warning.

    Args:
        stored: From the checkpoint; its states are forgotten if they are those of another optimizer.
        configured: What `configuration` says of the optimizer.
        optimizer: The optimizer.

    Raises:
        ValueError: If its groups of parameters are not those of the checkpoint.
    """
    before = stored.configured
    if not before:
        return
    if before["sizes"] != configured["sizes"]:
        raise ValueError(
            f"norm_weight_decay, bias_weight_decay and layer_decay make groups of {configured['sizes']} parameters,"
            f" and the optimizer of the checkpoint has groups of {before['sizes']}: when a run resumes, the value of"
            " a decay may change, but it cannot be added or removed (null, or 1 for layer_decay)"
        )
    pairs = list(zip(before["groups"], configured["groups"], strict=True))
    if "optimizer" in before:
        other = before["optimizer"] != configured["optimizer"]
    else:  # an earlier checkpoint
        other = any(not optimizer.defaults.keys() <= old.keys() for old, _ in pairs)
    if other or any(bool(old.get(key)) != bool(new.get(key)) for old, new in pairs for key in STATE_OPTIONS):
        stored.other_optimizer = True
        stored.optimizer_states.clear()
        warnings.warn(
            f"The optimizer of the checkpoint ({before.get('optimizer', 'another one')}) keeps other moments than that"
            f" of the configuration ({configured['optimizer']}), which begins without any.",
            stacklevel=2,
        )


def start(trainer: Trainer, configured: dict[str, Any], stored: Stored | None) -> None:
    """Give the schedule its length, and apply what the configuration of a resumed run has changed, nothing else.

    A schedule of which anything has changed goes on as if it had been configured so from the beginning: the time that
    has passed counts, in its new unit.

    Args:
        trainer: At the start of training.
        configured: What `configuration` says of the optimizer and the schedule; the length is added to it.
        stored: From the checkpoint; None for a new run.

    Raises:
        ArgumentError: If the schedule has a warm-up that is not shorter than the run.
        ValueError: If the schedule needs the length of a run that has none, or ends before the run.
    """
    before = stored.configured if stored else {}
    optimizer = trainer.optimizers[0]
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    time = num_epochs_trained(trainer) if configured["interval"] == "epoch" else trainer.global_step
    for scheduler in schedulers:
        _set_length(trainer, scheduler, time, configured, before)
    if stored is None:
        return
    same = ("schedule", "interval", "scheduler")
    if before and (stored.other_optimizer or any(before.get(k, configured[k]) != configured[k] for k in same)):
        for group, new in zip(optimizer.param_groups, configured["groups"], strict=True):
            group.update(copy.deepcopy(new))
        for scheduler in schedulers:
            _replay(scheduler, time)
        return
    for scheduler, state in zip(schedulers, stored.schedules, strict=True):
        scheduler.load_state_dict(state)
    if before:
        for group, old, new in zip(optimizer.param_groups, before["groups"], configured["groups"], strict=True):
            group.update({key: value for key, value in new.items() if key not in old or old[key] != value})


def _set_length(
    trainer: Trainer, scheduler: Any, time: int, configured: dict[str, Any], before: dict[str, Any]
) -> None:
    """Give its length to a schedule that lasts as long as the run, and check the length of one that must.

    This must wait until training starts. To count the steps of a run, Lightning makes the training loader, and a
    loader that is made before a checkpoint is restored would not continue where the checkpoint was written.
    """
    interval, schedule = configured["interval"], configured["schedule"]
    whole = trainer.max_epochs if interval == "epoch" else trainer.estimated_stepping_batches
    endless = whole is None or whole < 1 or math.isinf(whole)
    left = math.inf if endless else _left(trainer, interval)
    if isinstance(scheduler, RunLR) and schedule["total"] is None:
        if endless:
            raise ValueError(
                "the schedule lasts as long as the run, and this run has no end in units of"
                f" lr_scheduler_interval={interval!r}: set the trainer's max_epochs, or give the length as total of the"
                " lr_scheduler"
            )
        configured["length"] = whole
        old = before.get("schedule", {}).get("total")
        unchanged = before.get("interval") == interval and old and before.get("length", old) == whole
        # else epochs may have had another number of steps: what is left is counted by those of now
        scheduler.total = schedule["total"] = old if unchanged else max(time + int(left), 1)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined] # set where mypy does not look
            scheduler.check_total()
    limit = getattr(scheduler, "total_steps", None)  # that of OneCycleLR, which raises an error when it is passed
    if isinstance(limit, int) and not endless and limit < time + left:
        raise ValueError(
            f"lr_scheduler: {type(scheduler).__name__} ends after total_steps={limit}, and the run takes"
            f" {time + int(left)} in units of lr_scheduler_interval={interval!r}: set total_steps to that number, or"
            " make the run shorter"
        )


def _left(trainer: Trainer, interval: str) -> float:
    if interval == "step":
        return num_steps_left(trainer)
    return max((trainer.max_epochs or 0) - num_epochs_trained(trainer), 0)


def _replay(scheduler: LRScheduler, time: int) -> None:
    """Bring a new schedule to a time: most of torch's are functions of the time before."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        for _ in range(time):
            scheduler.step()
