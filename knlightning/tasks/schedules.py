"""Learning rate schedules whose length is that of the run. The schedules of torch can be used as well."""

import math
from abc import ABC, abstractmethod

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from knlightning.checks import check, check_number


class RunLR(LRScheduler, ABC):
    """Base of the schedules in which the initial learning rate is multiplied by a function of time and total length.

    The unit of time is the epoch, or the optimizer step if the task's `lr_scheduler_interval` is "step".

    Args:
        optimizer: Optimizer whose learning rates are set.
        total: Length, at least 1; None for the length of the run, which the task fills in.

    Raises:
        ArgumentError: If `total` is out of its range.
    """

    def __init__(self, optimizer: Optimizer, total: int | None) -> None:
        check_number("total", total, at_least=1, integer=True, none="the length of the run")
        self.total = total
        super().__init__(optimizer)

    @abstractmethod
    def fraction(self, time: int, total: int) -> float:
        """Compute the learning rate as a fraction of the initial one.

        Args:
            time: Time since the beginning, at least 0.
            total: Length; at time 0 it may not be known yet, and is 1 then.
        """

    def check_total(self) -> None:
        """Compare the arguments with the length, once it is known.

        Raises:
            ArgumentError: If they do not fit.
        """

    def get_lr(self) -> list[float | Tensor]:
        """Compute the learning rate of each parameter group at the present time.

        Raises:
            ValueError: If the length is not known.
        """
        if self.total is None and self.last_epoch > 0:
            name = type(self).__name__
            raise ValueError(f"{name}: outside of a Task, give its length, as in {name}(optimizer, total=150)")
        fraction = self.fraction(self.last_epoch, self.total or 1)
        return [initial * fraction for initial in self.base_lrs]


class CosineLR(RunLR):
    """Reduce the learning rate along half a cosine, from the initial one to a fraction of it at the end of the run.

    lr(t) = initial * (final + (1 - final) * (1 + cos(pi * (t - warmup) / (total - warmup))) / 2), after the end
    initial * final. With a warm-up, the learning rate first rises linearly: initial * (warmup_start +
    (1 - warmup_start) * t / warmup) up to t = warmup.
    The paper trains on CIFAR-100 with `final=0.01` (section 4.1), and ConvNeXt with five epochs of warm-up.

    Args:
        optimizer: Optimizer whose learning rates are set.
        final: Learning rate at the end as a fraction of the initial one, in [0, 1].
        total: Length in epochs, or in optimizer steps if the task's `lr_scheduler_interval` is "step"; None for the
            length of the run, which the task fills in. The warm-up is part of it.
        warmup: Length of the warm-up in the same unit, at least 0 and below `total`; 0 for none.
        warmup_start: Learning rate at the beginning of the warm-up as a fraction of the initial one, in [0, 1]; the
            default is that of torchvision's recipes.

    Raises:
        ArgumentError: If an argument is out of its range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        final: float = 0.0,
        total: int | None = None,
        warmup: int = 0,
        warmup_start: float = 0.01,
    ) -> None:
        check_number("final", final, at_least=0, at_most=1)
        check_number("warmup_start", warmup_start, at_least=0, at_most=1)
        check_number("warmup", warmup, at_least=0, integer=True)
        self.final = final
        self.warmup = warmup
        self.warmup_start = warmup_start
        super().__init__(optimizer, total)
        if total is not None:
            self.check_total()

    def check_total(self) -> None:
        """Compare the warm-up with the length.

        Raises:
            ArgumentError: If it is not shorter.
        """
        assert self.total is not None
        allowed = f"below the length of the schedule (total, or that of the run), which is {self.total}"
        check(self.warmup < self.total, "warmup", self.warmup, allowed)

    def fraction(self, time: int, total: int) -> float:
        """Compute the learning rate as a fraction of the initial one."""
        if time <= self.warmup:
            return 1 - (1 - self.warmup_start) * (self.warmup - time) / max(self.warmup, 1)
        progress = min((time - self.warmup) / max(total - self.warmup, 1), 1.0)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2


class PolyLR(RunLR):
    """Reduce the learning rate to zero along a power of the remaining time: lr(t) = initial * (1 - t / total) ** power.

    The paper trains on Cityscapes with it, advanced with every iteration (`lr_scheduler_interval` "step").

    Args:
        optimizer: Optimizer whose learning rates are set.
        power: The power, above 0.
        total: Length in epochs, or in optimizer steps if the task's `lr_scheduler_interval` is "step"; None for the
            length of the run, which the task fills in.

    Raises:
        ArgumentError: If an argument is out of its range.
    """

    def __init__(self, optimizer: Optimizer, power: float = 0.9, total: int | None = None) -> None:
        check_number("power", power, above=0)
        self.power = power
        super().__init__(optimizer, total)

    def fraction(self, time: int, total: int) -> float:
        """Compute the learning rate as a fraction of the initial one."""
        return max(1 - time / total, 0.0) ** self.power
