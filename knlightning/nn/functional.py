"""Kernel normalization in functional form (Nasirigerdeh et al., TMLR 2024, section 3 and Algorithm 1).

A *unit* is the window of all channels under the kernel at one output position. With dropout giving the unit U', every
unit U is normalized as (U - mean(U')) / sqrt(var(U') + eps).
"""

import functools
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knlightning.checks import ArgumentError, check_choice, check_number
from knlightning.internals.torch import function_transforms_active
from knlightning.nn import cpu_passes
from knlightning.nn.autograd import KNConvFunction
from knlightning.nn.composite import Call, Settings, is_channels_last, kn_conv_composite
from knlightning.nn.dropout import draw_dropped, draw_mask, mask_of
from knlightning.nn.fused import draw_seed, find_passes, fused_kn_conv
from knlightning.nn.kept_moments import Normalization, normalization_of
from knlightning.nn.kept_results import hand_back
from knlightning.nn.statistics import expected_inflation, inflate, pixel_moments, statistics_dtype, window_moments
from knlightning.nn.windows import PaddingMode, Window, check_input

__all__ = ["EvalStatistics", "Normalization", "check_dropout", "kernel_norm", "kn_conv", "normalization_of"]

EvalStatistics = Literal["clean", "expected", "sampled"]
_TENSORS = {Tensor, nn.Parameter, type(None)}


def kernel_norm(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dropout_p: float = 0.25,
    training: bool = True,
    eval_statistics: EvalStatistics = "expected",
    eps: float = 1e-5,
    mask: Tensor | None = None,
    *,
    dilation: int | Sequence[int] = 1,
    padding_mode: PaddingMode = "zeros",
) -> Tensor:
    """Normalize every window of the input by its own mean and variance, and lay the windows side by side.

    Padding is part of the windows. One dropout mask is drawn for the padded input and shared by overlapping windows:
    an element of the padding is dropped on its own, whichever element of the input it copies. So all elements of a
    window are dropped independently, as the "expected" statistics assume. Zeros need no mask.

    Source: Nasirigerdeh et al. (TMLR 2024), equations 1 to 3.

    Args:
        input: Floating point tensor [N, C, *spatial] with one to three spatial dimensions.
        kernel_size: Window size, one number or one for each spatial dimension.
        stride: Step between windows, one number or one for each spatial dimension.
        padding: Elements around the input: one number, one for each spatial dimension, for images
            (left, right, top, bottom), "same" or "valid", as in `torch.nn.Conv2d`.
        dropout_p: Probability in [0, 1) with which an element is left out of the statistics.
        training: Whether a dropout mask is drawn.
        eval_statistics: The moments used when not training: "clean", of the unit itself; "expected", the
            exact averages of what training sees; "sampled", a new mask at each call.
        eps: Added to the variance.
        mask: Bool tensor to use in place of a drawn mask, true where an element is kept. It has the input's shape, or
            that of the padded input if the padding is not with zeros.
        dilation: Step between the elements of a window, one number or one for each spatial dimension.
        padding_mode: "zeros", "reflect", "replicate" or "circular", as in `torch.nn.Conv2d`.

    Returns:
        Tensor [N, C, *(k * floor((size + padding - dilation * (k - 1) - 1) / stride + 1))].

    Raises:
        TypeError: If the input is not a floating point tensor.
        ArgumentError: If an argument is out of its range, or a window does not fit into the padded input.
    """
    spatial = input.dim() - 2
    check_input(input.shape, input.dtype, spatial)
    input, window = Window.of(spatial, kernel_size, stride, padding, dilation).pad(input, padding_mode)
    _check_mask(mask, input)
    size = input.shape[1] * math.prod(window.kernel_size)
    sampled, inflation = _dropout(size, dropout_p, training, eval_statistics)
    if sampled and mask is None:
        mask = draw_mask(input, dropout_p)
    moments = window_moments(*pixel_moments(input, mask if sampled else None, dropout_p), window)
    mean, var = inflate(*moments, inflation)
    ones = (1,) * spatial
    mean, rstd = (m.reshape(*m.shape, *ones) for m in (mean, torch.rsqrt(var + eps)))
    units = ((window.unfold(input) - mean) * rstd).to(input.dtype)
    # [N, C, p1, p2, k1, k2] -> [N, C, p1, k1, p2, k2] -> [N, C, p1 * k1, p2 * k2]
    order = [0, 1] + [d for i in range(spatial) for d in (2 + i, 2 + spatial + i)]
    sizes = [p * k for p, k in zip(units.shape[2 : 2 + spatial], window.kernel_size, strict=True)]
    return units.permute(order).reshape(*input.shape[:2], *sizes)


def kn_conv(
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
    mask: Tensor | None = None,
    relu_input: bool = False,
    relu_output: bool = False,
    residual: Tensor | None = None,
    keep_output: bool = False,
    *,
    dilation: int | Sequence[int] = 1,
    padding_mode: PaddingMode = "zeros",
    by_group: bool = False,
) -> Tensor:
    """Convolve the kernel normalized windows of the input: (conv(x, W) - mean * sum(W)) / sqrt(var + eps) + b.

    The statistics are those of `kernel_norm`, over all channels whatever the groups, or `by_group`. Under autocast the
    convolution runs in the lower precision and the statistics in float32.

    For backward an input and a convolution's result are kept; the latter until the output, or a ReLU of it, is the
    input of the next such convolution, which keeps that (`knlightning.nn.kept_results`). A network that knows what
    follows makes fewer tensors in the first place: with `keep_output` the output replaces the result, and
    with `relu_input`, `relu_output` and `residual` the operations around the convolution keep nothing of their own.
    Then the output must not be changed in place; autograd raises an error if it is. A padding that is not with zeros
    makes a copy of the input, which is kept.

    Source: Nasirigerdeh et al. (TMLR 2024), equation 5 and Algorithm 1.

    Args:
        input: Floating point tensor [N, C, *spatial] with one to three spatial dimensions.
        weight: Filters [O, C / groups, *kernel].
        bias: Tensor [O], or None.
        stride: Step between windows, one number or one for each spatial dimension.
        padding: As in `kernel_norm`.
        groups: Number of blocked connections from input to output channels.
        dropout_p: As in `kernel_norm`.
        training: As in `kernel_norm`.
        eval_statistics: As in `kernel_norm`.
        eps: Added to the variance.
        mask: As in `kernel_norm`.
        relu_input: Take relu(input) in place of the input.
        relu_output: Return the ReLU of the output; implies keep_output, excludes a residual.
        residual: Tensor of the output's shape to add to the output; implies keep_output.
        keep_output: Keep the output for backward.
        dilation: As in `kernel_norm`.
        padding_mode: As in `kernel_norm`.
        by_group: Normalize each group of channels by its own statistics; then more is kept for backward.

    Returns:
        Tensor [N, O, *floor((size + padding - dilation * (k - 1) - 1) / stride + 1)].

    Raises:
        TypeError: If the input is not a floating point tensor.
        ArgumentError: If an argument is out of its range, or the filters do not fit the input.
    """
    # of small convolutions in evaluation all this takes a good part of the time: few calls, and checks once a shape
    compiling = torch.compiler.is_compiling()
    geometry: list[Any] = [tuple(v) if isinstance(v, list) else v for v in (stride, padding, dilation)]
    pads, settings, sampled = (_plan.__wrapped__ if compiling else _plan)(
        input.shape, input.dtype, weight.shape, None if bias is None else bias.shape,
        None if residual is None else residual.shape, *geometry,
        padding_mode, groups, dropout_p, training, eval_statistics, eps, relu_input, relu_output, by_group,
    )  # fmt: skip
    if not compiling:
        hand_back(input)
    if pads is not None:
        input = F.pad(input, pads, padding_mode)
    _check_mask(mask, input)
    dtype, device = weight.dtype, input.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        input = input.to(dtype)
    if not sampled and (by_group or (groups == 1 and (input.itemsize < 4 or input.is_cuda))):
        weight = _centre(weight)
    weight = weight if weight.dtype == dtype else weight.to(dtype)
    composed = by_group or function_transforms_active()
    passes = None if composed or mask is not None else find_passes(input, weight, bias, residual, compiling)
    if composed or (compiling and (torch.compiler.is_exporting() or passes is None)):
        # Compilers and function transforms must see the operations themselves, and derive the gradient from them.
        if sampled and mask is None:
            mask = draw_mask(input, dropout_p)
        return kn_conv_composite(input, weight, bias, residual, mask if sampled else None, settings, by_group)
    keep_output = keep_output or relu_output or residual is not None or not torch.is_grad_enabled()
    if passes is not cpu_passes and not (input.is_contiguous() or is_channels_last(input)):
        input = input.contiguous()
    if not (compiling or {type(input), type(weight), type(bias), type(residual)} <= _TENSORS):
        # What follows a network by a class of tensors, as private training does, must see the operations, too.
        if sampled and mask is None:
            mask = _draw_as_seen(input, dropout_p, passes)
        return kn_conv_composite(input, weight, bias, residual, mask if sampled else None, settings)
    if passes is not None:
        seed = draw_seed(input.device) if sampled else None
        return fused_kn_conv(Call(input, weight, bias, residual, seed, settings), keep_output, passes)
    return _by_operations(input, weight, bias, residual, mask, sampled, keep_output, settings)


def _by_operations(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    sampled: bool,
    keep_output: bool,
    settings: Settings,
) -> Tensor:
    dropped = None
    if not sampled:
        mask = None
    elif mask is None and input.device.type == "cpu":
        dropped = draw_dropped(input.numel(), settings.dropout_p)
    elif mask is None:
        mask = draw_mask(input, settings.dropout_p)
    return KNConvFunction.apply(input, weight, bias, residual, mask, dropped, keep_output, settings)


def _draw_as_seen(input: Tensor, dropout_p: float, passes: ModuleType | None) -> Tensor:
    """Draw the mask of a convolution that draws none itself."""
    if passes is not None:
        drawn: Tensor = passes.mask_of_seed(draw_seed(input.device), input, dropout_p)
        return drawn
    if input.device.type == "cpu":
        return mask_of(draw_dropped(input.numel(), dropout_p), input)
    return draw_mask(input, dropout_p)


def check_dropout(dropout_p: float, eval_statistics: str) -> None:
    """Check a dropout probability and the name of the evaluation statistics.

    Raises:
        ArgumentError: If one of them is not allowed.
    """
    check_number("dropout_p", dropout_p, at_least=0, below=1)
    check_choice("eval_statistics", eval_statistics, get_args(EvalStatistics))


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: torch.Size,
    dtype: torch.dtype,
    filters: torch.Size,
    biases: torch.Size | None,
    added: torch.Size | None,
    stride: int | tuple[int, ...],
    padding: int | tuple[int, ...] | str,
    dilation: int | tuple[int, ...],
    padding_mode: str,
    groups: int,
    dropout_p: float,
    training: bool,
    eval_statistics: str,
    eps: float,
    relu_input: bool,
    relu_output: bool,
    by_group: bool,
) -> tuple[tuple[int, ...] | None, Settings, bool]:
    """Check the settings of a convolution with tensors of these shapes; once, since it takes as long as small ones.

    Returns:
        What the input is to be padded by, the settings with the windows of the result, and whether a mask is drawn.
    """
    check_input(shape, dtype, len(filters) - 2)
    window = Window.of(len(filters) - 2, filters[2:], stride, padding, dilation)
    window.check(shape[2:], padding_mode)
    if groups < 1 or filters[0] % groups or shape[1] != filters[1] * groups:
        allowed = f"[O, C / groups, *kernel] with C = {shape[1]} input channels and O a multiple of the groups"
        raise ArgumentError("weight's shape", tuple(filters), allowed, f"The number of groups is {groups}")
    size = math.prod(filters[1:]) * (1 if by_group else groups)
    if by_group and size == 1:
        raise ArgumentError("weight's shape", tuple(filters), "filters of more than one element of a group")
    if biases is not None and biases != filters[:1]:
        raise ArgumentError("bias's shape", tuple(biases), f"({filters[0]},), a number for each filter")
    if added is not None:
        output = (shape[0], filters[0], *window.positions(shape[2:]))
        if relu_output:
            raise ArgumentError("relu_output", True, "False with a residual", "Apply the ReLU to the sum")
        if added != output:
            raise ArgumentError("residual's shape", tuple(added), f"that of the output, {output}")
    sampled, inflation = _dropout(size, dropout_p, training, eval_statistics)
    pads = None if padding_mode == "zeros" or not any(window.pads) else window.pads
    inner = window if pads is None else window.without_padding()
    return pads, Settings(inner, groups, dropout_p, inflation, eps, relu_input, relu_output), sampled


def _dropout(size: int, p: float, training: bool, eval_statistics: str) -> tuple[bool, float]:
    """Check the arguments; return whether the statistics are of a mask, and the factor for `inflate`."""
    check_dropout(p, eval_statistics)
    if p == 0.0 or (not training and eval_statistics == "clean"):
        return False, 1.0
    if not training and eval_statistics == "expected":
        return False, expected_inflation(size, p)
    return True, 1.0


def _centre(weight: Tensor) -> Tensor:
    """Subtract the mean of each filter, which changes nothing without dropout: a window's mean is that of all it sees.

    In bfloat16, float16 and TF32 a convolution rounds mean * sum(W), which is then subtracted, and in windows that are
    nearly constant what remains is multiplied by up to 1 / sqrt(eps). Of centred filters there is little to round.
    """
    wide = weight.to(statistics_dtype(weight))
    return wide - wide.mean(tuple(range(1, weight.dim())), keepdim=True)


def _check_mask(mask: Tensor | None, input: Tensor) -> None:
    if mask is not None and (mask.shape != input.shape or mask.dtype != torch.bool):
        allowed = f"a bool tensor of shape {tuple(input.shape)}, that of the input or of what it is padded to"
        raise ArgumentError("mask", (mask.dtype, tuple(mask.shape)), allowed)
