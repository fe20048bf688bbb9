"""What private training knows of the loss of a task."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knlightning.privacy.batches import images_of, map_tensors
from knlightning.privacy.rules import LossReduction


def labels_of(batch: Any) -> list[Tensor]:
    """List the tensors of a batch that may be labels: those of whole numbers behind the images."""
    images, found = images_of(batch), []

    def look(part: Tensor) -> Tensor:
        if part is not images and not part.is_floating_point() and part.dtype != torch.bool:
            found.append(part)
        return part

    map_tensors(batch, look)
    return found


@dataclass(frozen=True)
class Loss:
    """What trial steps have found out of the loss of a task.

    Attributes:
        reduction: Whether it is the mean or the sum over the samples of a batch.
        ignored_labels: Labels of samples that it leaves out of its mean. With one of these in a batch, it is not the
            mean over the samples, so there must be none.
    """

    reduction: LossReduction = "mean"
    ignored_labels: frozenset[int] = frozenset()

    def check_labels(self, batch: Any) -> None:
        """Check that a training batch has no label that the loss leaves out.

        Raises:
            ValueError: If it has one.
        """
        for labels in labels_of(batch) if self.ignored_labels else ():
            for label in self.ignored_labels:
                if bool((labels == label).any()):
                    raise ValueError(
                        f"privacy: a training sample has the label {label}, which the loss leaves out of its mean, so"
                        " that it changes the share of all others: leave such samples out of the data set, or let"
                        " training_step take the mean of the losses of all samples"
                    )
