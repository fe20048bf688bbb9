"""The mean loss of labelled pixels."""

from typing import Literal

import torch
from torch import Tensor

LossMean = Literal["batch", "image"]

IGNORED = 255
"""Label of pixels that do not count in losses and metrics."""


def mean_of_pixels(
    losses: Tensor,
    labels: Tensor,
    class_weights: Tensor | None = None,
    mean: LossMean = "batch",
    ohem_threshold: float | None = None,
    ohem_min_kept: int = 131_072,
) -> tuple[Tensor, Tensor]:
    """Compute the mean loss of the labelled pixels as a sum and its divisor.

    With mean "batch", these are the sum of weight * loss and the sum of the weights over all labelled pixels of the
    batch; their quotient is the mean of torch's cross_entropy. With "image", this quotient is computed for each image
    (0 without labelled pixels), and the result is the sum over the images and their number: no image changes the share
    of another.

    Online hard example mining (Shrivastava et al., CVPR 2016, in the form of the public HRNet segmentation code)
    keeps the pixels whose true class has a probability below a threshold, and in any case a number of the hardest
    pixels; of the whole batch, or with "image" of each image.

    Args:
        losses: Cross-entropy of each pixel (N, H, W); 0 where it is ignored.
        labels: Classes (N, H, W), integers; 255 for pixels that are ignored.
        class_weights: Weights (classes,) of the pixels by their label; None for 1 each.
        mean: Whether the mean is over the pixels of the "batch", or of each "image" first.
        ohem_threshold: Probability in (0, 1]; None for no mining.
        ohem_min_kept: Number of labelled pixels that are kept in any case, at least 1.

    Returns:
        Two scalars, a sum and its divisor. With mean "batch" and no labelled pixels, both are 0.
    """
    labelled = labels != IGNORED
    weights = labelled.to(losses.dtype)
    if class_weights is not None:
        weights = weights * class_weights.to(losses.dtype)[labels.where(labelled, 0)]
    losses, weights, labelled = (t.flatten(1 if mean == "image" else 0) for t in (losses, weights, labelled))
    if ohem_threshold is not None:
        probabilities = (-losses.detach()).exp().where(labelled, 2.0)  # 2: behind all others
        least = probabilities.kthvalue(min(ohem_min_kept, losses.shape[-1]), dim=-1, keepdim=True).values
        weights = weights * ((probabilities < ohem_threshold) | (probabilities <= least))
    sums, divisors = (losses * weights).sum(-1), weights.sum(-1)
    if mean == "batch":
        return sums, divisors
    return quotient(sums, divisors).sum(), divisors.new_tensor(float(len(divisors)))


def quotient(sums: Tensor, divisors: Tensor) -> Tensor:
    """Divide sums by divisors; if a divisor is 0, the quotient and its gradient are 0."""
    return sums / torch.where(divisors == 0, 1.0, divisors)
