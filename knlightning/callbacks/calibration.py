"""How well the probabilities of predictions fit: expected calibration error, and the reliability diagram.

Source: Guo et al. (ICML 2017).
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics import Metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_BINS = 15
UNIT = 2**-24
"""In which probabilities are added, as whole numbers: sums in float32 would not grow beyond some 2**24 pixels."""


class Reliability(Metric):
    """Count predictions, and the right ones among them, by the probability of the predicted class.

    torchmetrics' MulticlassCalibrationError computes the same error. It keeps every prediction until the end, which
    the pixels of segmentation are too many for, and has no diagram.
    """

    full_state_update = False
    counts: Tensor
    hits: Tensor
    probabilities: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(NUM_BINS, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("hits", torch.zeros(NUM_BINS, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("probabilities", torch.zeros(NUM_BINS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, right: Tensor) -> None:
        """Add predictions.

        Args:
            probabilities: Probability of the predicted class (N,) in [0, 1].
            right: Whether it is the true one (N,), bool.
        """
        bins = (probabilities * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        self.counts.scatter_add_(0, bins, torch.ones_like(bins))
        self.hits.scatter_add_(0, bins, right.long())
        self.probabilities.scatter_add_(0, bins, (probabilities / UNIT).round().long())

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return number, accuracy and mean probability of the predictions in each bin; NaN where there are none."""
        return self.counts, self.hits / self.counts, self.probabilities / self.counts * UNIT


def expected_calibration_error(counts: Tensor, accuracy: Tensor, probability: Tensor) -> float:
    """Compute the mean over all predictions of the difference between accuracy and probability in their bin."""
    return float(((accuracy - probability).abs().nan_to_num() * counts).sum() / counts.sum())


def reliability_figure(counts: Tensor, accuracy: Tensor, probability: Tensor) -> "Figure":
    """Draw the accuracy of predictions by their probability, and below how many there are."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    centres, width = [(number + 0.5) / NUM_BINS for number in range(NUM_BINS)], 0.92 / NUM_BINS
    upper.bar(centres, accuracy.nan_to_num().tolist(), width, color="#8f9bdc", label="accuracy")
    upper.plot([0, 1], [0, 1], "--", color="#667080", linewidth=1, label="perfectly calibrated")
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    error = expected_calibration_error(counts, accuracy, probability)
    upper.set_title(f"expected calibration error {error:.3f}", fontsize=10)
    upper.legend(loc="upper left", fontsize=8, frameon=False)
    lower.bar(centres, (counts / counts.sum()).tolist(), width, color="#c3c9d2")
    lower.set(xlabel="probability of the predicted class", ylabel="share", ylim=(0, 1))
    return figure
