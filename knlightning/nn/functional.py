"""Kernel normalization without unfolding (Nasirigerdeh et al., TMLR 2024, section 3 and Algorithm 1).

A *unit* is the window of all channels under the kernel at one output position. With dropout giving
the unit U', every unit U is normalized as (U - mean(U')) / sqrt(var(U') + eps). Neighbouring units
overlap, but their statistics need no unfolded copy of the input. By the law of total variance

    mean(unit) = mean over pixels of the pixels' channel means
    var(unit)  = mean over pixels of the pixels' channel variances
                 + variance over pixels of the pixels' channel means,

so one pass over the input yields two maps with one channel each, and windows over those maps yield
the rest. Both terms are centred, so nothing cancels where the mean is large beside the spread.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

EvalStatistics = Literal["clean", "expected", "sampled"]

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def kernel_norm(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dropout_p: float = 0.25,
    training: bool = True,
    eval_statistics: EvalStatistics = "clean",
    eps: float = 1e-5,
    mask: Tensor | None = None,
) -> Tensor:
    """Normalize every window of the input by its own mean and variance, and lay the windows side by side.

    Source: Nasirigerdeh et al. (TMLR 2024), equations 1 to 3. One dropout mask is drawn for the input and
    shared by overlapping windows; zero padding is part of the windows.

    Args:
        input: floating point tensor [N, C, *spatial] with one to three spatial dimensions.
        kernel_size: window size, one number or one for each spatial dimension.
        stride: step between windows, likewise.
        padding: zeros around the input: one number, one for each spatial dimension, or for images
            (left, right, top, bottom).
        dropout_p: probability in [0, 1) with which an element is left out of the statistics.
        training: whether a dropout mask is drawn.
        eval_statistics: the moments used when not training: "clean", of the unit itself; "expected", the
            exact averages of what training sees; "sampled", a fresh mask at each call.
        eps: added to the variance.
        mask: bool tensor of the input's shape, true where an element is kept, in place of a drawn one.

    Returns:
        Tensor [N, C, *(k * floor((size + padding - k) / stride + 1))].

    Raises:
        TypeError: if the input is not a floating point tensor.
        ValueError: if an argument is out of its range, or a window does not fit into the padded input.
    """
    kernel_size, stride, pads = _check_geometry(input, input.dim() - 2, kernel_size, stride, padding)
    dropout_p = _effective_dropout(dropout_p, training, eval_statistics)
    mask, inflation = _dropout_state(input, kernel_size, dropout_p, training, eval_statistics, mask)
    mean, var = _inflate(*window_statistics(input, kernel_size, stride, pads, mask, dropout_p), inflation)

    windows = F.pad(input, pads)
    spatial = input.dim() - 2
    for i, (size, step) in enumerate(zip(kernel_size, stride, strict=True)):
        windows = windows.unfold(2 + i, size, step)  # [N, C, *positions, *kernel]
    ones = (1,) * spatial
    mean, rstd = (m.reshape(*m.shape, *ones) for m in (mean, torch.rsqrt(var + eps)))
    units = ((windows - mean) * rstd).to(input.dtype)
    # [N, C, p1, p2, k1, k2] -> [N, C, p1, k1, p2, k2] -> [N, C, p1 * k1, p2 * k2]
    order = [0, 1] + [d for i in range(spatial) for d in (2 + i, 2 + spatial + i)]
    sizes = [p * k for p, k in zip(units.shape[2 : 2 + spatial], kernel_size, strict=True)]
    return units.permute(order).reshape(*input.shape[:2], *sizes)


def kn_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    dropout_p: float = 0.05,
    training: bool = True,
    eval_statistics: EvalStatistics = "clean",
    eps: float = 1e-5,
    mask: Tensor | None = None,
) -> Tensor:
    """Convolve the kernel normalized windows of the input: (conv(x, W) - mean * sum(W)) / sqrt(var + eps) + b.

    Source: Nasirigerdeh et al. (TMLR 2024), equation 5 and Algorithm 1. The statistics are those of
    :func:`kernel_norm`, over all channels whatever the groups. Under autocast the convolution runs in the
    lower precision and the statistics in float32.

    Args:
        input: floating point tensor [N, C, *spatial] with one to three spatial dimensions.
        weight: filters [O, C / groups, *kernel].
        bias: tensor [O], or None.
        stride: step between windows, one number or one for each spatial dimension.
        padding: as in :func:`kernel_norm`.
        groups: number of blocked connections from input to output channels.
        dropout_p: as in :func:`kernel_norm`.
        training: as in :func:`kernel_norm`.
        eval_statistics: as in :func:`kernel_norm`.
        eps: added to the variance.
        mask: as in :func:`kernel_norm`.

    Returns:
        Tensor [N, O, *floor((size + padding - k) / stride + 1)].

    Raises:
        TypeError: if the input is not a floating point tensor.
        ValueError: if an argument is out of its range, or the filters do not fit the input.
    """
    spatial = weight.dim() - 2
    kernel_size, stride, pads = _check_geometry(input, spatial, weight.shape[2:], stride, padding)
    if groups < 1 or weight.shape[0] % groups or input.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} with groups={groups} takes {weight.shape[1] * groups} "
            f"input channels and a number of filters that {groups} divides, got {input.shape[1]} input channels"
        )
    dropout_p = _effective_dropout(dropout_p, training, eval_statistics)
    if torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight = input.to(dtype), weight.to(dtype)
    mask, inflation = _dropout_state(input, kernel_size, dropout_p, training, eval_statistics, mask)
    settings = (stride, pads, groups, dropout_p, inflation, eps)
    # The closed form pays when autograd records it eagerly. Compilers and function transforms want to see
    # the operations themselves, and derive the same gradient from them.
    if (
        torch.is_grad_enabled()
        and (input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad))
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    ):
        return _KNConv.apply(input, weight, bias, mask, *settings)
    return _kn_conv_composite(input, weight, bias, mask, *settings)


def window_statistics(
    input: Tensor,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    pads: tuple[int, ...],
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute mean and biased variance of every (dropped out) window over all channels.

    Args:
        input: tensor [N, C, *spatial].
        kernel_size: window size in each spatial dimension.
        stride: step between windows in each spatial dimension.
        pads: zeros around the input in the order of :func:`torch.nn.functional.pad`.
        mask: bool tensor of the input's shape, true where an element is kept, or None.
        dropout_p: elements kept by the mask are scaled by 1 / (1 - dropout_p).

    Returns:
        Two tensors [N, 1, *positions], float32 or, for a float64 input, float64.
    """
    return _window_moments(*_pixel_moments(input, mask, dropout_p), kernel_size, stride, pads)


def _pixel_moments(input: Tensor, mask: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Compute mean and biased variance over the channels of each pixel; two tensors [N, 1, *spatial]."""
    values = input.to(_statistics_dtype(input))
    if mask is not None:
        values = values * mask * (1.0 / (1.0 - dropout_p))
    return _moments(values, 1, keepdim=True)


def _window_moments(
    mean: Tensor, var: Tensor, kernel_size: tuple[int, ...], stride: tuple[int, ...], pads: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Merge the moments of pixels into those of windows, one dimension after the other."""
    mean, var = F.pad(mean, pads), F.pad(var, pads)
    for i, (size, step) in enumerate(zip(kernel_size, stride, strict=True)):
        if size > 1 or step > 1:
            mean, between = _moments(mean.unfold(2 + i, size, step), -1)
            var = var.unfold(2 + i, size, step).mean(-1) + between
    return mean, var


def _moments(values: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """Compute mean and biased variance along a dimension; torch.var_mean warns of an empty batch."""
    if values.numel() == 0:
        return values.sum(dim, keepdim), values.sum(dim, keepdim)
    var, mean = torch.var_mean(values, dim, correction=0, keepdim=keepdim)
    return mean, var


def draw_mask(input: Tensor, dropout_p: float) -> Tensor:
    """Draw a bool tensor of the input's shape, each element true with probability 1 - dropout_p."""
    return torch.empty_like(input, dtype=torch.bool).bernoulli_(1.0 - dropout_p)


def _statistics_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def check_dropout(p: float, eval_statistics: str) -> None:
    """Check a dropout probability and the name of the evaluation statistics.

    Raises:
        ValueError: if one of them is not allowed.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {p}")
    if eval_statistics not in get_args(EvalStatistics):
        raise ValueError(
            f"eval_statistics must be one of {', '.join(get_args(EvalStatistics))}, got {eval_statistics!r}"
        )


def _effective_dropout(p: float, training: bool, eval_statistics: str) -> float:
    """Check the arguments; return the probability in force, 0 where the statistics are clean."""
    check_dropout(p, eval_statistics)
    return 0.0 if not training and eval_statistics == "clean" else p


def _dropout_state(
    input: Tensor,
    kernel_size: tuple[int, ...],
    p: float,
    training: bool,
    eval_statistics: str,
    mask: Tensor | None,
) -> tuple[Tensor | None, float]:
    """Return the mask, if the statistics are sampled, and the factor for :func:`_inflate`, if expected."""
    if mask is not None and (mask.shape != input.shape or mask.dtype != torch.bool):
        raise ValueError(
            f"mask must be a bool tensor of the input's shape {tuple(input.shape)}, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    if p == 0.0:
        return None, 1.0
    if not training and eval_statistics == "expected":
        size = input.shape[1] * math.prod(kernel_size)
        return None, (1.0 - p / size) / (1.0 - p)
    return draw_mask(input, p) if mask is None else mask, 1.0


def _inflate(mean: Tensor, var: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Average the window's dropped out moments over all masks, with factor = (1 - p / size) / (1 - p).

    The mean stays, and E[var'] = factor * mean(x^2) - mean^2, written so that nothing cancels.
    """
    return (mean, var) if factor == 1.0 else (mean, factor * var + (factor - 1.0) * mean.square())


def _kn_conv_composite(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: tuple[int, ...],
    pads: tuple[int, ...],
    groups: int,
    dropout_p: float,
    inflation: float,
    eps: float,
) -> Tensor:
    mean, var = _inflate(*window_statistics(input, tuple(weight.shape[2:]), stride, pads, mask, dropout_p), inflation)
    centred = _centred_convolution(input, weight, mean, stride, pads, groups)
    return _scale(centred, torch.rsqrt(var + eps), bias).to(input.dtype)


def _centred_convolution(
    input: Tensor, weight: Tensor, mean: Tensor, stride: tuple[int, ...], pads: tuple[int, ...], groups: int
) -> Tensor:
    """Convolve the input less its windows' means: conv(x, W) - mean * sum(W)."""
    input, padding = _convolution_padding(input, pads)
    product = _CONVOLUTIONS[weight.dim() - 2](input, weight, None, stride, padding, 1, groups)
    return product - mean * _filter_sums(weight, mean.dtype)


def _scale(centred: Tensor, rstd: Tensor, bias: Tensor | None) -> Tensor:
    output = centred * rstd
    return output if bias is None else output + bias.view(-1, *(1,) * (output.dim() - 2))


def _convolution_padding(input: Tensor, pads: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """Leave symmetric padding to the convolution; pad the input for what it cannot express."""
    before, after = pads[::2][::-1], pads[1::2][::-1]
    return (input, before) if before == after else (F.pad(input, pads), (0,) * len(before))


def _filter_sums(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum each filter; shape [O, 1, ...] with the spatial dimensions of the weight."""
    return weight.flatten(1).sum(1, dtype=dtype).view(-1, *(1,) * (weight.dim() - 2))


class _KNConv(torch.autograd.Function):
    """Kernel normalized convolution with its gradient in closed form.

    With G the gradient at the output y = o * r + b, where o = conv(x, W) - mean * sum(W), r = 1 / sqrt(var + eps)
    and g = G * r:

        db = sum(G),  dW = wgrad(x, g) - sum(g * mean),  d_mean = -sum_o g * sum(W),  d_r = sum_o G * o,
        dx = igrad(g, W) + m / (1 - p) * (d_mean' + 2 * d_var' * (x' - mean')) / C,

    with the mask m and the dropped out input x'. mean' and var' are the pixels' moments over the C channels; their
    gradients d_mean' and d_var' follow from d_mean and d_r through maps with one channel, which is left to autograd.
    Nothing kept for backward grows with the kernel size.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, *settings: Any
    ) -> Tensor:
        stride, pads, groups, dropout_p, inflation, eps = settings
        pixels = _pixel_moments(input, mask, dropout_p)
        mean, var = _inflate(*_window_moments(*pixels, tuple(weight.shape[2:]), stride, pads), inflation)
        centred = _centred_convolution(input, weight, mean, stride, pads, groups).to(input.dtype)
        # The output itself is not kept: it may be changed in place by the operation that follows.
        ctx.save_for_backward(input, weight, bias, mask, centred, *pixels)
        ctx.settings = settings
        return _scale(centred, torch.rsqrt(var + eps), bias).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, mask, centred, pixel_mean, pixel_var = ctx.saved_tensors
        stride, pads, groups, dropout_p, inflation, eps = ctx.settings
        needs = ctx.needs_input_grad[:3]
        nothing = (None,) * (1 + len(ctx.settings))
        if torch.is_grad_enabled():  # a graph of the gradient is wanted: differentiate the operations
            wanted = [t for t, needed in zip((input, weight, bias), needs, strict=True) if needed]
            output = _kn_conv_composite(input, weight, bias, mask, *ctx.settings)
            found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
            return *(next(found) if needed else None for needed in needs), *nothing

        spatial = weight.dim() - 2
        positions = (0, *range(2, 2 + spatial))
        with torch.enable_grad():
            pixels = pixel_mean.detach().requires_grad_(), pixel_var.detach().requires_grad_()
            mean, var = _inflate(*_window_moments(*pixels, tuple(weight.shape[2:]), stride, pads), inflation)
            rstd = torch.rsqrt(var + eps)
        scaled = grad * rstd.detach()
        padded, padding = _convolution_padding(input, pads)
        d_input, d_weight, _ = torch.ops.aten.convolution_backward(
            scaled.to(weight.dtype), padded, weight, None, stride, padding,
            (1,) * spatial, False, (0,) * spatial, groups, (needs[0], needs[1], False),
        )  # fmt: skip
        if needs[1]:
            shift = (scaled * mean.detach()).sum(positions).to(weight.dtype)
            d_weight -= shift.view(-1, *(1,) * (1 + spatial))
        d_bias = grad.sum(positions, dtype=bias.dtype) if needs[2] else None
        if needs[0]:
            d_mean = -(scaled * _filter_sums(weight, mean.dtype)).sum(1, keepdim=True)
            d_rstd = (grad * centred).sum(1, keepdim=True, dtype=mean.dtype)
            d_pixel_mean, d_pixel_var = torch.autograd.grad((mean, rstd), pixels, (d_mean, d_rstd))
            keep = 1.0 - dropout_p if mask is not None else 1.0
            slope = d_pixel_var * (2.0 / input.shape[1])
            constant = d_pixel_mean / input.shape[1] - slope * pixel_mean
            through_statistics = torch.addcmul(constant / keep, slope / keep**2, input)
            if mask is not None:
                through_statistics *= mask
            d_input = through_statistics.add_(d_input if padded is input else F.pad(d_input, [-p for p in pads]))
            d_input = d_input.to(input.dtype)
        return d_input, d_weight, d_bias, *nothing


def _check_geometry(
    input: Tensor,
    spatial: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Check input and window; return kernel size and stride for each dimension, and the pads of F.pad."""
    if not input.is_floating_point():
        raise TypeError(f"kernel normalization takes a floating point tensor, got {input.dtype}")
    if not 1 <= spatial <= 3 or input.dim() != spatial + 2:
        raise ValueError(
            f"the input must have shape [N, C, *spatial] with one to three spatial dimensions, as many as the "
            f"kernel has, got shape {tuple(input.shape)} for {spatial} dimension(s)"
        )
    kernel_size = per_dimension(kernel_size, spatial, "kernel_size", 1)
    stride = per_dimension(stride, spatial, "stride", 1)
    pads = padding_pairs(padding, spatial)
    for i, (size, k) in enumerate(zip(input.shape[2:], kernel_size, strict=True)):
        before, after = pads[2 * (spatial - 1 - i)], pads[2 * (spatial - 1 - i) + 1]
        if size + before + after < k:
            raise ValueError(
                f"a kernel of size {k} is larger than the padded input in spatial dimension {i}: "
                f"{before} + {size} + {after} = {size + before + after}"
            )
    return kernel_size, stride, pads


def per_dimension(value: int | Sequence[int], spatial: int, name: str, least: int) -> tuple[int, ...]:
    """Expand one number to all spatial dimensions.

    Raises:
        ValueError: if the count is wrong or a number is below `least`.
    """
    values = (value,) * spatial if isinstance(value, int) else tuple(value)
    if len(values) != spatial or any(not isinstance(v, int) or v < least for v in values):
        raise ValueError(
            f"{name} must be an integer of at least {least}, or {spatial} of them (one for each spatial "
            f"dimension), got {value!r}"
        )
    return values


def padding_pairs(padding: int | Sequence[int], spatial: int) -> tuple[int, ...]:
    """Expand padding to the order of :func:`torch.nn.functional.pad`: last dimension first, before and after.

    Raises:
        ValueError: if padding is neither one number, one for each dimension, nor for images four.
    """
    if spatial == 2 and not isinstance(padding, int) and len(padding) == 4:
        return per_dimension(padding, 4, "padding", 0)  # (left, right, top, bottom) is that order already
    try:
        each = per_dimension(padding, spatial, "padding", 0)
    except ValueError as error:
        form = ", or (left, right, top, bottom)" if spatial == 2 else ""
        raise ValueError(f"{error}{form}") from None
    return tuple(p for size in reversed(each) for p in (size, size))
