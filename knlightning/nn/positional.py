"""Positional normalization (Li, Wu, Weinberger and Belongie, NeurIPS 2019)."""

import torch.nn.functional as F
from torch import Tensor, nn


def positional_norm(input: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalize each position by the mean and the biased variance of its channels.

    Source: Li et al. (2019), section 3.

    Args:
        input: Floating point tensor [N, C, H, W].
        eps: Added to the variance.

    Returns:
        Tensor [N, C, H, W], in memory as channels-last.
    """
    return F.layer_norm(input.movedim(1, -1), input.shape[1:2], eps=eps).movedim(-1, 1)


class PositionalNorm2d(nn.LayerNorm):
    """Normalize each position of an image by the moments of its channels: layer normalization of every pixel.

    Maps [N, C, H, W] to the same shape. Source: Li et al. (2019).

    Args:
        channels: Number of channels of the input.
        eps: Added to the variance.
        affine: Whether to scale and shift each channel by a weight and a bias of shape [C].
    """

    def __init__(self, channels: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(channels, eps, affine)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize images.

        Args:
            input: Floating point tensor [N, C, H, W].

        Returns:
            Tensor of the same shape.
        """
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)
