"""Kernel normalized convolutions in groups, each group of channels with statistics of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from knlightning.checks import check
from knlightning.nn.autograd import Settings, convolve, filter_sums
from knlightning.nn.conv import KNConv1d, KNConv2d, KNConv3d, _KNConv
from knlightning.nn.dropout import draw_mask
from knlightning.nn.functional import EvalStatistics, check_dropout
from knlightning.nn.statistics import expected_inflation, inflate, pixel_moments, window_moments
from knlightning.nn.windows import PaddingMode, Window, check_input


def kn_conv_by_group(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    groups: int = 1,
    dropout_p: float = 0.05,
    training: bool = True,
    eval_statistics: EvalStatistics = "expected",
    eps: float = 1e-5,
    *,
    dilation: int | Sequence[int] = 1,
    padding_mode: PaddingMode = "zeros",
) -> Tensor:
    """Convolve each group of channels as `knlightning.nn.kn_conv` does by itself, and lay the results side by side.

    Arguments and result are those of `kn_conv`. Composed of differentiable operations, it keeps more for backward.

    Raises:
        TypeError: If the input is not a floating point tensor.
        ArgumentError: If an argument is out of its range, or a window of a group is a single element.
    """
    spatial = weight.dim() - 2
    check_input(input, spatial)
    check_dropout(dropout_p, eval_statistics)
    check(weight[0].numel() > 1, "weight's shape", tuple(weight.shape), "filters of more than one element of a group")
    input, window = Window.of(spatial, weight.shape[2:], stride, padding, dilation).pad(input, padding_mode)
    fits = groups >= 1 and weight.shape[0] % groups == 0 and input.shape[1] == weight.shape[1] * groups
    check(fits, "weight's shape", tuple(weight.shape), f"[O, C / groups, *kernel], for {groups} groups")
    parts = input.unflatten(1, (groups, -1)).flatten(0, 1)
    sampled = dropout_p > 0 and (training or eval_statistics == "sampled")
    mask = draw_mask(parts, dropout_p) if sampled else None
    expected = not training and eval_statistics == "expected"
    inflation = expected_inflation(weight[0].numel(), dropout_p) if expected else 1.0
    moments = inflate(*window_moments(*pixel_moments(parts, mask, dropout_p), window), inflation)
    mean, var = (m.unflatten(0, (-1, groups)).squeeze(2).repeat_interleave(len(weight) // groups, 1) for m in moments)
    convolved = convolve(input, weight, Settings(window, groups, dropout_p, inflation, eps, False, False))
    ones = (1,) * spatial
    output = (convolved - mean * filter_sums(weight, mean.dtype).view(-1, *ones)) * torch.rsqrt(var + eps)
    return (output if bias is None else output + bias.view(-1, *ones)).to(convolved.dtype)


class _ByGroup(_KNConv):
    def forward(
        self,
        input: Tensor,
        relu_input: bool = False,
        relu_output: bool = False,
        residual: Tensor | None = None,
        keep_output: bool = False,
    ) -> Tensor:
        """Normalize each group and convolve.

        Args:
            input: Floating point tensor (N, in_channels, ...) with a length, height and width, or depth too.
            relu_input: Whether to take the ReLU of the input first.
            relu_output: Whether to take the ReLU of the result.
            residual: Tensor of the shape of the result that is added to it; None for none.
            keep_output: Without effect.

        Returns:
            Tensor (N, out_channels, ...).
        """
        output = kn_conv_by_group(
            input.relu() if relu_input else input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.groups,
            self.dropout_p,
            self.training,
            self.eval_statistics,
            self.eps,
            dilation=self.dilation,
            padding_mode=self.padding_mode,
        )
        output = output if residual is None else output + residual
        return output.relu() if relu_output or self.relu_output else output


class GroupKNConv1d(_ByGroup, KNConv1d):
    """Convolution of sequences in groups that are kernel normalized one by one; see `GroupKNConv2d`."""


class GroupKNConv2d(_ByGroup, KNConv2d):
    """Convolution of images in groups that are kernel normalized one by one.

    Each group of channels is normalized by the mean and variance of its own part of a window. `KNConv2d`, whose
    arguments it has, takes them over all channels.
    """


class GroupKNConv3d(_ByGroup, KNConv3d):
    """Convolution of volumes in groups that are kernel normalized one by one; see `GroupKNConv2d`."""
