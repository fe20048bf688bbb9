"""The metrics of an epoch."""

from abc import ABC, abstractmethod

from torch import Tensor, nn
from torchmetrics import Metric


class Metrics(nn.Module, ABC):
    """The metrics of an epoch, over all of its batches and devices."""

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """Compute the value of each metric by its name, the same on every device."""

    def reset(self) -> None:
        """Forget all batches."""
        for metric in self.children():
            if isinstance(metric, Metric):
                metric.reset()
