"""What a checkpoint holds besides private weights: no value that was computed from training samples without noise."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from knlightning.internals.lightning import overridden
from knlightning.privacy.private_metrics import NAMES

CHECKED_BATCHES = 20
"""Number of batches after each of which the state of the task is compared; some may be empty."""
_TRAINING = re.compile(r"train(ing)?[/_.-]")


def check_monitors(trainer: Trainer) -> None:
    """Refuse callbacks and schedules that follow a metric whose name says that it is of training.

    Args:
        trainer: Before or in `fit`; schedules are known at the start of training.

    Raises:
        ValueError: If there is one.
    """
    for name, who in _monitors(trainer):
        if _TRAINING.match(name):
            raise ValueError(_refusal(name, who))


class StoredValues:
    """Compares what a checkpoint holds of a task, without what is trained, before and after training steps.

    Args:
        task: The task that is trained.
    """

    def __init__(self, task: LightningModule) -> None:
        self.task = task
        self.before: dict[str, Any] | None = None
        self.batches = 0

    def check(self) -> None:
        """Compare; to be called before each batch.

        Raises:
            ValueError: If a step has changed something.
        """
        if self.batches > CHECKED_BATCHES:
            return
        self.batches += 1
        now, before = self._state(), self.before
        self.before = now
        for name, value in (now if before is not None else {}).items():
            if before is not None and name in before and not _same(value, before[name]):
                raise ValueError(
                    f"differential privacy: a training step has changed {name}, which checkpoints hold without noise:"
                    " it may tell of the samples, or of their number. Keep it out of the state dict (persistent=False"
                    " for buffers and metrics), or leave it as it is in training"
                )

    def check_last(self) -> None:
        """Compare before something else than training may change the task.

        Raises:
            ValueError: If a step has changed something.
        """
        self.check()
        self.before = None

    def _state(self) -> dict[str, Any]:
        trained = {name for name, p in self.task.named_parameters(remove_duplicate=False) if p.requires_grad}
        state = {name: value for name, value in self.task.state_dict().items() if name not in trained}
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}


@contextmanager
def watched_values(trainer: Trainer, task: LightningModule) -> Iterator[StoredValues]:
    """Refuse, while a task is trained, that something which is logged in training decides what a checkpoint holds.

    Args:
        trainer: At the start of training.
        task: The task that is trained.

    Yields:
        What compares the state of the task before and after a step.

    Raises:
        ValueError: If a callback or a schedule follows a value that training logs.
    """
    check_monitors(trainer)
    monitors = {
        f"{name}{suffix}": (name, who) for name, who in _monitors(trainer) for suffix in ("", "_step", "_epoch")
    }
    monitors |= {name.removesuffix("_step").removesuffix("_epoch"): (name, who) for name, who in _monitors(trainer)}
    original = task.log

    def log(name: str, *args: Any, **kwargs: Any) -> None:
        if trainer.training and name in monitors and name not in ("privacy/epsilon", *NAMES):
            raise ValueError(_refusal(*monitors[name]))
        original(name, *args, **kwargs)

    with overridden(task, "log", log):
        yield StoredValues(task)


def _monitors(trainer: Any) -> Iterator[tuple[str, str]]:
    """List the metrics that callbacks and schedules follow, and who follows them."""
    for callback in trainer.callbacks:
        kind = type(callback).__name__
        if isinstance(name := getattr(callback, "monitor", None), str):
            yield name, kind
        for filename in ("filename", "CHECKPOINT_NAME_LAST"):
            found = re.findall(r"\{([^{}:]+)", str(getattr(callback, filename, "")))
            yield from ((name, f"the {filename} of {kind}") for name in found)
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau:
            yield config.monitor, type(config.scheduler).__name__


def _refusal(name: str, who: str) -> str:
    return (
        f"differential privacy: {who} follows {name}, a value of the training samples without noise, which decides what"
        " checkpoints there are and is stored in them. Follow a metric of the validation"
    )


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and bool(((one == two) | ((one != one) & (two != two))).all())
    try:
        return bool(one == two)
    except (RuntimeError, ValueError, TypeError):  # of tensors within
        return one is two
