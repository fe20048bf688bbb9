"""The kernel normalized convolutional layers (Nasirigerdeh et al., TMLR 2024, Algorithm 1)."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from knlightning.nn import functional as KF
from knlightning.nn.functional import EvalStatistics
from knlightning.nn.geometry import padding_pairs, per_dimension


class _KNConv(nn.Module):
    spatial: ClassVar[int]
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dropout_p: float = 0.05,
        eps: float = 1e-5,
        eval_statistics: EvalStatistics = "clean",
    ) -> None:
        super().__init__()
        if groups < 1 or in_channels < 1 or out_channels < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                "in_channels, out_channels and groups must be at least 1 and groups must divide both numbers of "
                f"channels, got in_channels={in_channels}, out_channels={out_channels}, groups={groups}"
            )
        KF.check_dropout(dropout_p, eval_statistics)
        padding_pairs(padding, self.spatial)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = per_dimension(kernel_size, self.spatial, "kernel_size", 1)
        self.stride = per_dimension(stride, self.spatial, "stride", 1)
        self.padding = padding if isinstance(padding, int) else tuple(padding)
        self.groups = groups
        self.dropout_p = dropout_p
        self.eps = eps
        self.eval_statistics: EvalStatistics = eval_statistics
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight as the published networks do: Kaiming normal, fan-out, ReLU gain; zero the bias."""
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        input: Tensor,
        relu_input: bool = False,
        relu_output: bool = False,
        residual: Tensor | None = None,
        keep_output: bool = False,
    ) -> Tensor:
        return KF.kn_conv(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.groups,
            self.dropout_p,
            self.training,
            self.eval_statistics,
            self.eps,
            None,
            relu_input,
            relu_output,
            residual,
            keep_output,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, groups={self.groups}, bias={self.bias is not None}, "
            f"dropout_p={self.dropout_p}, eps={self.eps}, eval_statistics={self.eval_statistics!r}"
        )


class KNConv1d(_KNConv):
    """Kernel normalized convolution of sequences [N, C, L]; see :class:`KNConv2d`."""

    spatial = 1


class KNConv2d(_KNConv):
    """Convolve an image whose windows are first normalized by their own mean and variance over all channels.

    Maps [N, in_channels, H, W] to [N, out_channels, p_h, p_w], where p = floor((size + padding - k) / stride + 1).
    It takes the place of a convolution and of its normalization, needs no batch, and its state dict is that of
    :class:`torch.nn.Conv2d`. Source: Nasirigerdeh et al. (TMLR 2024), equation 5 and Algorithm 1.

    Args:
        in_channels: channels of the input.
        out_channels: number of filters.
        kernel_size: window size, one number or one for each dimension.
        stride: step between windows, likewise.
        padding: zeros around the input: one number, one for each dimension, or (left, right, top, bottom).
        groups: blocked connections between channels; the statistics are over all channels all the same.
        bias: whether to add a bias.
        dropout_p: probability in [0, 1) with which an element is left out of the statistics in training; one mask
            is drawn at each call and shared by overlapping windows.
        eps: added to the variance.
        eval_statistics: the moments used in evaluation: "clean" (of the window itself), "expected" (averages of
            what training sees) or "sampled" (a fresh mask at each call, as in the published code).

    Raises:
        ValueError: if an argument is out of its range.
    """

    spatial = 2


class KNConv3d(_KNConv):
    """Kernel normalized convolution of volumes [N, C, D, H, W]; see :class:`KNConv2d`."""

    spatial = 3
