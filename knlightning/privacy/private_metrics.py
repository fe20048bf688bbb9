"""Values of the training samples that may be shown: the share of clipped ones, and the accuracy, with noise.

They are two more coordinates of what each sample contributes to a step. All of it together has the norm bound /
sqrt(1 - share) at most, and gets noise for that: the same mechanism, sampling and epsilon, with 1 / sqrt(1 - share)
times the noise on the gradient. Source: Andrew et al., Differentially private learning with adaptive clipping (NeurIPS
2021), who release the share of clipped samples likewise.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

METRICS_SHARE = 0.02
"""Share of the squared bound that the values get, so that the gradient has 1 % more noise."""
NAMES = ("privacy/clipped", "privacy/train_acc")
"""Names of the values in the log, in the order of their coordinates."""


class PrivateMetrics:
    """Means of the values over the steps of an epoch: each step has released them, with noise.

    Args:
        task: The task that is trained. The accuracy is that of its output, if its training step calls the task itself.
    """

    def __init__(self, task: LightningModule) -> None:
        self.task = task
        self._seen = False
        self._total, self._steps = torch.zeros(len(NAMES), dtype=torch.float64), 0

    @contextmanager
    def watching(self) -> Iterator[list[Tensor]]:
        """Note what the task returns, while a training step is taken."""
        outputs: list[Tensor] = []
        handle = self.task.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            yield outputs
        finally:
            handle.remove()

    def correct(self, outputs: list[Tensor], labels: list[Tensor], views: int) -> Tensor | None:
        """Tell for each sample whether its class is the most probable one; of segmentation, the share of its pixels.

        Args:
            outputs: What the task returned in a training step, the logits [N, classes, ...] last.
            labels: Tensors of the batch that may be labels; the first one of a fitting shape is taken.
            views: Number of rows of each sample.

        Returns:
            Float tensor [N / views] of [0, 1]; None if there are no logits and labels.
        """
        for logits in outputs[-1:]:
            for one in labels if isinstance(logits, Tensor) and logits.dim() > 1 else ():
                if one.shape == (len(logits), *logits.shape[2:]):
                    self._seen = True
                    return (logits.argmax(1) == one).float().reshape(len(one) // views, -1).mean(1)
        return None

    def add(self, values: Tensor) -> None:
        """Add what a step has released."""
        self._total += values.cpu()
        self._steps += 1

    def pop(self) -> dict[str, float]:
        """Return the means by name, and begin anew; without the accuracy if no step could tell it."""
        means = dict(zip(NAMES, (self._total / max(self._steps, 1)).tolist(), strict=True))
        shown = means if self._seen else {NAMES[0]: means[NAMES[0]]}
        found, self._steps = shown if self._steps else {}, 0
        self._total.zero_()
        return found
