"""Kernel normalized convolutions with standardized filters (Qiao et al., 2019, arXiv:1903.10520)."""

import torch.nn.functional as F
from torch import Tensor

from knlightning.nn.conv import KNConv2d


class StandardizedKNConv2d(KNConv2d):
    """Convolve kernel normalized windows with filters that have mean 0 and variance 1, as `StdConv2d` of timm has them.

    Its arguments and its state dict are those of `KNConv2d`.

    Attributes:
        filter_eps: Added to the variance of a filter.
    """

    filter_eps = 1e-6

    @property
    def filters(self) -> Tensor:
        rows = self.weight.flatten(1).unsqueeze(0)
        return F.batch_norm(rows, None, None, training=True, eps=self.filter_eps).view_as(self.weight)
