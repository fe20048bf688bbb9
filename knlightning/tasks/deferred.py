"""Checks of values on a device that no step waits for."""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

Check = Callable[[Tensor], None]
"""Raises an error if values, on the host, are wrong."""


class DeferredChecks:
    """Look at values of a device when they have arrived on the host.

    On a CPU that is at once. From a CUDA device they are copied while it goes on, and looked at when the next values
    are added, or when somebody waits for them: before a checkpoint is written, and at the end of an epoch.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[Tensor, Any, Check]] = deque()

    def add(self, values: Tensor, check: Check) -> bool:
        """Have values looked at.

        Args:
            values: A few numbers.
            check: Raises an error if they are wrong.

        Returns:
            Whether they have been looked at.
        """
        self.look()
        copied = copied_to_host(values)
        if copied is None:
            check(values)
            return True
        self._pending.append((*copied, check))
        return False

    def look(self, wait: bool = False) -> None:
        """Look at the values that have arrived, in their order; if asked to wait, at all."""
        while self._pending and (wait or self._pending[0][1].query()):
            values, arrival, check = self._pending.popleft()
            arrival.synchronize()
            check(values)

    def forget(self) -> None:
        """Forget the values of a run that was broken off."""
        self._pending.clear()


def copied_to_host(values: Tensor) -> tuple[Tensor, Any] | None:
    """Begin to copy values of a CUDA device to the host, without waiting; None for those of other devices.

    Returns:
        The copy, and an event with the methods `query` and `synchronize` that comes when it is complete.
    """
    if values.device.type != "cuda":
        return None
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    arrival = torch.cuda.Event()
    arrival.record(torch.cuda.current_stream(values.device))
    return copy, arrival


def check_finite(where: str, loss: Tensor) -> None:
    """Check that a training loss is finite.

    Args:
        where: At which batch, for the message.
        loss: The loss, a scalar.

    Raises:
        FloatingPointError: If it is not.
    """
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the training loss is {loss.item()} at {where}. Try a lower learning rate of the optimizer, or the"
            " trainer's gradient_clip_val=1; instead of its precision 16-mixed try bf16-mixed or 32-true; and check"
            " that the images themselves are finite."
        )


def labels_within(checks: DeferredChecks, labels: Tensor, num_classes: int, message: str, ignored: int = 0) -> Tensor:
    """Check that labels are classes: on a GPU the errors of the loss itself end the process, and say little.

    Args:
        checks: When to look at them.
        labels: Integers of any shape.
        num_classes: Number of classes.
        message: For the error, with `{label}` in it.
        ignored: A label that is allowed besides; 0, which always is, for none.

    Returns:
        The labels. Those that are wrong, and were not looked at yet, are replaced by classes, for which a loss can be
        computed.

    Raises:
        ValueError: If a label is neither a class nor ignored; at once, or when `checks` look at them.
    """
    if not labels.numel():
        return labels
    counting = labels if ignored == 0 else labels.where(labels != ignored, 0)
    if checks.add(torch.stack(counting.aminmax()), partial(_check_range, num_classes, message)):
        return labels
    return torch.where(labels == ignored, labels, counting.clamp(0, num_classes - 1))


def _check_range(num_classes: int, message: str, extremes: Tensor) -> None:
    low, high = extremes.tolist()
    if low < 0 or high >= num_classes:
        raise ValueError(message.format(label=low if low < 0 else high))
