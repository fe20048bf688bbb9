"""Learning rate schedules whose length is that of the run. Those of torch can be used beside them."""

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class CosineLR(LRScheduler):
    """Let the rate fall along half a cosine, from the initial one to a fraction of it at the end of the run.

    rate(t) = initial * (final + (1 - final) * (1 + cos(pi * t / total)) / 2), after the end initial * final.
    The paper trains on CIFAR-100 with `final=0.01` (section 4.1).

    Args:
        optimizer: whose rates are set.
        final: rate at the end as a fraction of the initial one, in [0, 1].
        total: length in epochs, or in optimizer steps if the task's `lr_scheduler_interval` is "step"; None for the
            length of the run, which the task fills in.

    Raises:
        ValueError: if `final` or `total` is out of its range.
    """

    def __init__(self, optimizer: Optimizer, final: float = 0.0, total: int | None = None) -> None:
        if not 0 <= final <= 1:
            raise ValueError(f"CosineLR: final is a fraction of the initial rate in [0, 1], got {final}")
        if total is not None and total < 1:
            raise ValueError(f"CosineLR: total must be at least 1, or null for the length of the run, got {total}")
        self.final = final
        self.total = total
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Compute the rate of each parameter group at the present step."""
        return [rate * self._fraction() for rate in self.base_lrs]

    def _fraction(self) -> float:
        if self.last_epoch == 0:  # asked for by the constructor, before a task could fill in the total
            return 1.0
        if self.total is None:
            raise ValueError("CosineLR: outside of a Task give its length, as in CosineLR(optimizer, total=150)")
        progress = min(self.last_epoch / self.total, 1.0)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2
