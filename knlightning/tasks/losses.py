"""Cross-entropy of labelled pixels."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

LossMean = Literal["batch", "image"]

IGNORED = 255
"""Label of the pixels that count neither in a loss nor in a metric."""


def pixel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    class_weights: Tensor | None = None,
    mean: LossMean = "batch",
    ohem_threshold: float | None = None,
    ohem_min_kept: int = 131_072,
) -> tuple[Tensor, Tensor]:
    """Sum the cross-entropy of the labelled pixels, and what it is to be divided by.

    With "batch" these are, over all labelled pixels of the batch, the sum of weight * loss and that of the weights:
    the ratio is the mean of torch's cross_entropy. With "image" the ratio is taken for each image, 0 where no pixel is
    labelled, and what is returned is the sum over the images and their number: no image changes another's share.

    Online hard example mining (Shrivastava et al., CVPR 2016, in the form of the public HRNet segmentation code)
    keeps the pixels whose true class has a probability below a threshold, and at least a number of the hardest ones;
    of the whole batch, or with "image" of each image.

    Args:
        logits: (N, classes, H, W).
        labels: (N, H, W), integers below the number of classes, or 255 for pixels that are ignored.
        class_weights: (classes,), of the pixels by their label; None for 1 each.
        mean: whether the mean is over the pixels of the "batch", or of each "image" first.
        ohem_threshold: probability in (0, 1]; None for no mining.
        ohem_min_kept: pixels that are kept at least, where so many are labelled; at least 1.

    Returns:
        two scalars, a sum and its divisor, of which both are 0 where nothing is labelled and the mean is "batch".
    """
    labelled = labels != IGNORED
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")  # 0 where ignored
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
    """Divide; 0 where the divisor is 0, with a gradient of 0."""
    return sums / torch.where(divisors == 0, 1.0, divisors)
