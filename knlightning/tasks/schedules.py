"""Learning rate schedules whose length is that of the run. Those of torch can be used beside them."""

import math
from abc import ABC, abstractmethod

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class RunLR(LRScheduler, ABC):
    """Base of the schedules whose rate is the initial one times a function of the time and the length of the run.

    Times are counted in epochs, or in optimizer steps if the task's `lr_scheduler_interval` is "step".

    Args:
        optimizer: whose rates are set.
        total: length; None for that of the run, which the task fills in.

    Raises:
        ValueError: if `total` is out of its range.
    """

    def __init__(self, optimizer: Optimizer, total: int | None) -> None:
        if total is not None and total < 1:
            raise ValueError(
                f"{type(self).__name__}: total must be at least 1, or null for the length of the run, got {total}"
            )
        self.total = total
        super().__init__(optimizer)

    @abstractmethod
    def fraction(self, time: int, total: int) -> float:
        """Compute the rate as a fraction of the initial one.

        Args:
            time: since the beginning, at least 0.
            total: length; at time 0 it may not be known yet, and is given as 1.
        """

    def get_lr(self) -> list[float | Tensor]:
        """Compute the rate of each parameter group at the present time."""
        if self.total is None and self.last_epoch > 0:
            name = type(self).__name__
            raise ValueError(f"{name}: outside of a Task give its length, as in {name}(optimizer, total=150)")
        fraction = self.fraction(self.last_epoch, self.total or 1)
        return [rate * fraction for rate in self.base_lrs]


class CosineLR(RunLR):
    """Let the rate fall along half a cosine, from the initial one to a fraction of it at the end of the run.

    rate(t) = initial * (final + (1 - final) * (1 + cos(pi * (t - warmup) / (total - warmup))) / 2), after the end
    initial * final. With a warm-up, the rate first rises linearly: initial * (warmup_start + (1 - warmup_start) * t /
    warmup) up to t = warmup. A run that is shorter than that, such as a first try, ends within it.
    The paper trains on CIFAR-100 with `final=0.01` (section 4.1), and ConvNeXt with five epochs of warm-up.

    Args:
        optimizer: whose rates are set.
        final: rate at the end as a fraction of the initial one, in [0, 1].
        total: length in epochs, or in optimizer steps if the task's `lr_scheduler_interval` is "step"; None for the
            length of the run, which the task fills in. The warm-up is part of it.
        warmup: length of the warm-up in the same unit; 0 for none.
        warmup_start: rate at the beginning of the warm-up as a fraction of the initial one, in [0, 1]; the default is
            that of torchvision's recipes.

    Raises:
        ValueError: if an argument is out of its range, or a given total does not outlast the warm-up.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        final: float = 0.0,
        total: int | None = None,
        warmup: int = 0,
        warmup_start: float = 0.01,
    ) -> None:
        for name, value in (("final", final), ("warmup_start", warmup_start)):
            if not 0 <= value <= 1:
                raise ValueError(f"CosineLR: {name} is a fraction of the initial rate in [0, 1], got {value}")
        if warmup < 0 or (total is not None and 0 < total <= warmup):
            raise ValueError(f"CosineLR: warmup must be at least 0, and below total ({total}), got {warmup}")
        self.final = final
        self.warmup = warmup
        self.warmup_start = warmup_start
        super().__init__(optimizer, total)

    def fraction(self, time: int, total: int) -> float:
        """Compute the rate as a fraction of the initial one."""
        if time <= self.warmup:
            return 1 - (1 - self.warmup_start) * (self.warmup - time) / max(self.warmup, 1)
        progress = min((time - self.warmup) / max(total - self.warmup, 1), 1.0)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2


class PolyLR(RunLR):
    """Let the rate fall to zero as a power of the time that is left: rate(t) = initial * (1 - t / total) ** power.

    The paper trains on Cityscapes with it, advanced with every iteration (`lr_scheduler_interval` "step").

    Args:
        optimizer: whose rates are set.
        power: above 0.
        total: length in epochs, or in optimizer steps if the task's `lr_scheduler_interval` is "step"; None for the
            length of the run, which the task fills in.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(self, optimizer: Optimizer, power: float = 0.9, total: int | None = None) -> None:
        if power <= 0:
            raise ValueError(f"PolyLR: power must be above 0, got {power}")
        self.power = power
        super().__init__(optimizer, total)

    def fraction(self, time: int, total: int) -> float:
        """Compute the rate as a fraction of the initial one."""
        return max(1 - time / total, 0.0) ** self.power
