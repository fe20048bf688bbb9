"""The kernel normalized convolution composed of differentiable operations, and the parts that all ways share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from knlightning.nn.statistics import inflate, pixel_moments, window_moments
from knlightning.nn.windows import Window

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True, eq=False)
class Settings:
    """What a kernel normalized convolution computes with its tensors; a key by identity, which is found fastest.

    Args:
        window: The windows.
        groups: Number of blocked connections between channels.
        dropout_p: Probability with which an element is dropped, if there is a mask.
        inflation: The factor of `knlightning.nn.statistics.inflate`.
        eps: Added to the variance.
        relu_input: Whether the ReLU of the input is convolved.
        relu_output: Whether the output is followed by a ReLU.
    """

    window: Window
    groups: int
    dropout_p: float
    inflation: float
    eps: float
    relu_input: bool
    relu_output: bool


class Call(NamedTuple):
    """What a kernel normalized convolution is computed from by fused kernels.

    Attributes:
        input: Tensor [N, C, *spatial], contiguous in the usual or the channels-last format.
        weight: Filters [O, C / groups, *kernel] of the same dtype.
        bias: Tensor [O], or None.
        residual: Tensor [N, O, *positions], or None.
        seed: Int64 tensor [1] from which the mask is drawn, or None for no dropout.
        settings: The settings.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    seed: Tensor | None
    settings: Settings


def kn_conv_composite(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    settings: Settings,
    by_group: bool = False,
) -> Tensor:
    """Compute a kernel normalized convolution by differentiable operations; see `knlightning.nn.kn_conv`."""
    if settings.relu_input:
        input = input.relu()
    parts, groups = input, settings.groups
    if by_group:
        parts = input.unflatten(1, (groups, -1)).flatten(0, 1)
        mask = None if mask is None else mask.unflatten(1, (groups, -1)).flatten(0, 1)
    pixels = pixel_moments(parts, mask, settings.dropout_p)
    mean, var = inflate(*window_moments(*pixels, settings.window), settings.inflation)
    if by_group:
        each, shape = weight.shape[0] // groups, (input.shape[0], groups, *mean.shape[2:])
        mean, var = (m.reshape(shape).repeat_interleave(each, 1) for m in (mean, var))
    centred = convolve(input, weight, settings) - mean * per_filter(filter_sums(weight, mean.dtype), weight)
    output = centred * torch.rsqrt(var + settings.eps)
    if bias is not None:
        output = output + per_filter(bias, weight)
    if residual is not None:
        output = output + residual
    output = output.to(input.dtype)
    return output.relu() if settings.relu_output else output


def composite_gradients(
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    mask: Tensor | None,
    grad: Tensor,
    needs: tuple[bool, ...],
    settings: Settings,
) -> list[Tensor | None]:
    """Differentiate `kn_conv_composite` so that the gradients themselves can be differentiated.

    Args:
        inputs: Input, weight, bias and residual.
        mask: Bool tensor of the input's shape, or None.
        grad: Gradient at the output.
        needs: Which of the inputs get a gradient.
        settings: The settings.
    """
    wanted = [t for t, needed in zip(inputs, needs, strict=True) if needed and t is not None]
    output = kn_conv_composite(*inputs, mask, settings)
    found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return [next(found) if needed else None for needed in needs]


def convolve(input: Tensor, weight: Tensor, settings: Settings, bias: Tensor | None = None) -> Tensor:
    """Convolve the input in the usual way."""
    window = settings.window
    input, padding = pad_unevenly(input, window)
    convolution = _CONVOLUTIONS[weight.dim() - 2]
    return convolution(input, weight, bias, window.stride, padding, window.dilation, settings.groups)


def convolution_gradients(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    settings: Settings,
    needs: Sequence[bool],
    bias: Tensor | None = None,
) -> tuple[Any, Any, Any]:
    """Return the gradients of input, weight and bias of `convolve`; None for those that are not needed."""
    window = settings.window
    padded, padding = pad_unevenly(input, window)
    d_input, d_weight, d_bias = torch.ops.aten.convolution_backward.default(
        grad, padded, weight, None if bias is None else bias.shape, window.stride, padding, window.dilation,
        False, (0,) * len(padding), settings.groups, list(needs),
    )  # fmt: skip
    if needs[0] and padded is not input:
        d_input = F.pad(d_input, [-p for p in window.pads])
    return d_input, d_weight, d_bias


def pad_unevenly(input: Tensor, window: Window) -> tuple[Tensor, tuple[int, ...]]:
    """Leave symmetric padding to the convolution; pad the input for what it cannot express."""
    before, after = zip(*window.padding, strict=True)
    return (input, before) if before == after else (F.pad(input, window.pads), (0,) * len(before))


def filter_sums(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum each filter; shape [O]."""
    return weight.sum(tuple(range(1, weight.dim())), dtype=dtype)


def per_filter(values: Tensor, weight: Tensor) -> Tensor:
    """Shape one value for each filter so that it broadcasts over positions."""
    return values.view(-1, *(1,) * (weight.dim() - 2))


def is_channels_last(input: Tensor) -> bool:
    """Whether a tensor is contiguous in the channels-last format of images or volumes."""
    return input.dim() in CHANNELS_LAST and input.is_contiguous(memory_format=CHANNELS_LAST[input.dim()])
