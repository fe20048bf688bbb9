"""Kernel normalization in functional form (Nasirigerdeh et al., TMLR 2024, section 3 and Algorithm 1).

A *unit* is the window of all channels under the kernel at one output position. With dropout giving the unit U', every
unit U is normalized as (U - mean(U')) / sqrt(var(U') + eps).
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from knlightning.nn.geometry import check_geometry
from knlightning.nn.statistics import (
    draw_dropped,
    draw_mask,
    expected_inflation,
    in_memory_order,
    inflate,
    mask_of,
    pixel_moments,
    pixel_moments_by_sums,
    window_moments,
    windows_transposed,
)

EvalStatistics = Literal["clean", "expected", "sampled"]

_LARGE = 16 * 2**20
"""Bytes of a temporary on a CPU: larger ones leave the caches, and are new pages, whose first touch is expensive."""

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
    kernel_size, stride, pads = check_geometry(input, input.dim() - 2, kernel_size, stride, padding)
    sampled, inflation = _dropout(input, kernel_size, dropout_p, training, eval_statistics, mask)
    if sampled and mask is None:
        mask = draw_mask(input, dropout_p)
    moments = window_moments(*pixel_moments(input, mask if sampled else None, dropout_p), kernel_size, stride, pads)
    mean, var = inflate(*moments, inflation)

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
    relu_input: bool = False,
    relu_output: bool = False,
    residual: Tensor | None = None,
    keep_output: bool = False,
) -> Tensor:
    """Convolve the kernel normalized windows of the input: (conv(x, W) - mean * sum(W)) / sqrt(var + eps) + b.

    Source: Nasirigerdeh et al. (TMLR 2024), equation 5 and Algorithm 1. The statistics are those of
    :func:`kernel_norm`, over all channels whatever the groups. Under autocast the convolution runs in the
    lower precision and the statistics in float32.

    For backward an input and a convolution's result are kept. A network whose layers follow one another can do with
    one tensor a layer: with `keep_output` the output, which the next layer keeps anyway, stands in for the result, and
    with `relu_input`, `relu_output` and `residual` the operations around the convolution keep nothing of their own.
    Then the output must not be changed in place; autograd raises an error if it is.

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
        relu_input: take relu(input) in place of the input.
        relu_output: return the ReLU of the output; implies keep_output, excludes a residual.
        residual: tensor of the output's shape to add to the output; implies keep_output.
        keep_output: keep the output for backward.

    Returns:
        Tensor [N, O, *floor((size + padding - k) / stride + 1)].

    Raises:
        TypeError: if the input is not a floating point tensor.
        ValueError: if an argument is out of its range, or the filters do not fit the input.
    """
    spatial = weight.dim() - 2
    kernel_size, stride, pads = check_geometry(input, spatial, weight.shape[2:], stride, padding)
    if groups < 1 or weight.shape[0] % groups or input.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} with groups={groups} takes {weight.shape[1] * groups} "
            f"input channels and a number of filters that {groups} divides, got {input.shape[1]} input channels"
        )
    if torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight = input.to(dtype), weight.to(dtype)
    if relu_output and residual is not None:
        raise ValueError("relu_output and residual exclude each other: apply the ReLU to the sum")
    if residual is not None:
        before, after = pads[::2][::-1], pads[1::2][::-1]
        sizes = zip(input.shape[2:], before, after, kernel_size, stride, strict=True)
        shape = (input.shape[0], weight.shape[0], *((n + b + a - k) // step + 1 for n, b, a, k, step in sizes))
        if residual.shape != shape:
            raise ValueError(f"residual must have the output's shape {shape}, got {tuple(residual.shape)}")
    sampled, inflation = _dropout(input, kernel_size, dropout_p, training, eval_statistics, mask)
    settings = _Settings(stride, pads, groups, dropout_p, inflation, eps, relu_input, relu_output)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        # Compilers and function transforms want to see the operations themselves, and derive the gradient from them.
        if sampled and mask is None:
            mask = draw_mask(input, dropout_p)
        return _kn_conv_composite(input, weight, bias, residual, mask if sampled else None, settings)

    if not (input.is_contiguous() or _is_channels_last(input)):
        input = input.contiguous()
    dropped = None
    if sampled and mask is None:
        if input.device.type == "cpu":
            dropped = draw_dropped(input.numel(), dropout_p)
        else:
            mask = draw_mask(input, dropout_p)
    keep_output = keep_output or relu_output or residual is not None or not torch.is_grad_enabled()
    return _KNConv.apply(input, weight, bias, residual, mask if sampled else None, dropped, keep_output, settings)


class Normalization(NamedTuple):
    """What a call of :func:`kn_conv` convolved, and how it normalized it.

    Args:
        input: the input as it was convolved, before `relu_input`: [N, C, *spatial], detached.
        mean: means of the windows, dropped out as they were: [N, 1, *positions], float32 or float64.
        rstd: 1 / sqrt(var + eps) of the windows, of the same shape.
        pads: zeros around the input in the order of :func:`torch.nn.functional.pad`.
        relu_input: as in :func:`kn_conv`.
        relu_output: likewise.
    """

    input: Tensor
    mean: Tensor
    rstd: Tensor
    pads: tuple[int, ...]
    relu_input: bool
    relu_output: bool


def normalization_of(output: Tensor) -> Normalization:
    """Look up what a call of :func:`kn_conv` keeps for its backward pass; nothing is computed or copied.

    Args:
        output: what it returned, itself and not a view of it, before its backward pass.

    Raises:
        ValueError: if the tensor is not the result of such a call, or nothing was kept as no gradient is wanted.
    """
    node = output.grad_fn
    if getattr(node, "_forward_cls", None) is not _KNConv:  # the node of a function written in Python names it
        raise ValueError(
            "the moments of a kernel normalized convolution can be had from its eager output only, and only while its "
            f"gradient is wanted, got a tensor made by {'no operation' if node is None else node.name()}"
        )
    input, *_, mean, rstd, _ = node.saved_tensors  # type: ignore[union-attr] # checked above
    settings = node.settings  # type: ignore[union-attr]
    return Normalization(input.detach(), mean, rstd, settings.pads, settings.relu_input, settings.relu_output)


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


def _dropout(
    input: Tensor, kernel_size: tuple[int, ...], p: float, training: bool, eval_statistics: str, mask: Tensor | None
) -> tuple[bool, float]:
    """Check the arguments; return whether the statistics are of a mask, and the factor for `inflate`."""
    check_dropout(p, eval_statistics)
    if mask is not None and (mask.shape != input.shape or mask.dtype != torch.bool):
        raise ValueError(
            f"mask must be a bool tensor of the input's shape {tuple(input.shape)}, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    if p == 0.0 or (not training and eval_statistics == "clean"):
        return False, 1.0
    if not training and eval_statistics == "expected":
        return False, expected_inflation(input.shape[1] * math.prod(kernel_size), p)
    return True, 1.0


def _is_channels_last(input: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return input.dim() in formats and input.is_contiguous(memory_format=formats[input.dim()])


class _Settings(NamedTuple):
    stride: tuple[int, ...]
    pads: tuple[int, ...]
    groups: int
    dropout_p: float
    inflation: float
    eps: float
    relu_input: bool
    relu_output: bool


def _kn_conv_composite(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    settings: _Settings,
) -> Tensor:
    stride, pads, groups, dropout_p, inflation, eps, relu_input, relu_output = settings
    if relu_input:
        input = input.relu()
    pixels = pixel_moments(input, mask, dropout_p)
    mean, var = inflate(*window_moments(*pixels, tuple(weight.shape[2:]), stride, pads), inflation)
    centred = _convolve(input, weight, stride, pads, groups) - mean * _per_filter(_sums(weight, mean.dtype), weight)
    output = centred * torch.rsqrt(var + eps)
    if bias is not None:
        output = output + _per_filter(bias, weight)
    if residual is not None:
        output = output + residual
    output = output.to(input.dtype)
    return output.relu() if relu_output else output


def _convolve(input: Tensor, weight: Tensor, stride: tuple[int, ...], pads: tuple[int, ...], groups: int) -> Tensor:
    input, padding = _convolution_padding(input, pads)
    return _CONVOLUTIONS[weight.dim() - 2](input, weight, None, stride, padding, 1, groups)


def _convolution_padding(input: Tensor, pads: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """Leave symmetric padding to the convolution; pad the input for what it cannot express."""
    before, after = pads[::2][::-1], pads[1::2][::-1]
    return (input, before) if before == after else (F.pad(input, pads), (0,) * len(before))


def _sums(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum each filter; shape [O]."""
    return weight.sum(tuple(range(1, weight.dim())), dtype=dtype)


def _over_filters(grad: Tensor, vectors: Tensor) -> Tensor:
    """Sum grad [N, O, *positions] times each of the vectors [K, O] over the filters; shape [N, K, *positions]."""
    if _is_channels_last(grad):
        return F.linear(grad.movedim(1, -1), vectors).movedim(-1, 1)
    return torch.matmul(vectors, grad.flatten(2)).unflatten(2, grad.shape[2:])


def _over_positions(grad: Tensor, map: Tensor) -> Tensor:
    """Sum grad [N, O, *positions] times a map [N, 1, *positions] over samples and positions; shape [O]."""
    return torch.bmm(map.flatten(2), grad.flatten(2).transpose(1, 2)).sum((0, 1))


def _per_filter(values: Tensor, weight: Tensor) -> Tensor:
    """Shape one value for each filter so that it broadcasts over positions."""
    return values.view(-1, *(1,) * (weight.dim() - 2))


class _KNConv(torch.autograd.Function):
    """Kernel normalized convolution with its gradient in closed form.

    With G the gradient at the output y = o * r + b, where o = conv(x, W) - mean * sum(W), r = 1 / sqrt(var + eps)
    and g = G * r:

        db = sum(G),  dW = wgrad(x, g) - sum(g * mean),  d_mean = -sum_o g * sum(W),  d_r = sum_o G * o,
        d_var = -r^3 / 2 * d_r,  dx = igrad(g, W) + m / (1 - p) * (A + B * x'),
        A = window^T(d_mean - 2 * d_var * mean) / size,  B = window^T(2 * d_var) / size,

    with the mask m, the dropped out input x', the size of a window in elements, and window^T the transpose of summing
    over windows, on maps with one channel. Nothing kept for backward grows with the kernel size. The gradient is taken
    for a few samples at a time where a batch is large.

    What is kept besides the input is either o or, with `keep_output`, the output, from which d_r follows too:
    sum_o G * o = sum_o G * (y - b - residual) / r, also behind a ReLU, where G is zero unless y is positive.

    The mask comes as a tensor (`mask`) or as the positions in memory that are `dropped`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        dropped: Tensor | None,
        keep_output: bool,
        settings: _Settings,
    ) -> Tensor:
        stride, pads, groups, dropout_p, inflation, eps, relu_input, relu_output = settings
        x = input.relu() if relu_input else input
        if x.device.type == "cpu" and mask is None:
            pixels = pixel_moments_by_sums(x, dropped, dropout_p)
        else:
            pixels = pixel_moments(x, mask, dropout_p)
        mean, var = inflate(*window_moments(*pixels, tuple(weight.shape[2:]), stride, pads), inflation)
        rstd = torch.rsqrt(var + eps)
        sums = _sums(weight, mean.dtype)
        if mask is None and dropped is None and groups == 1 and mean.numel() * weight.shape[0] > 2 * weight.numel():
            # the mean is that of all a filter sees: centre the filters, which are smaller than the result
            centre = sums.div(weight[0].numel()).to(weight.dtype).view(-1, *(1,) * (weight.dim() - 1))
            kept = _convolve(x, weight - centre, stride, pads, groups)
            dtype, kept = kept.dtype, kept.to(mean.dtype)
        else:
            kept = _convolve(x, weight, stride, pads, groups)
            dtype = kept.dtype
            kept = kept.to(mean.dtype).addcmul_(mean, _per_filter(sums, weight), value=-1.0)
        shift = rstd.new_zeros(()) if bias is None else _per_filter(bias, weight)
        output = torch.addcmul(shift, kept, rstd, out=kept if keep_output else None)
        if residual is not None:
            output.add_(residual)
        if relu_output:
            output.relu_()
        output = output.to(dtype)
        kept = output if keep_output else kept.to(dtype)
        ctx.save_for_backward(input, weight, bias, residual, mask, dropped, kept, mean, rstd, sums)
        ctx.kept_output, ctx.settings = keep_output, settings
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, residual, mask, dropped, kept, *_ = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        nothing = (None,) * 4
        if torch.is_grad_enabled():  # a graph of the gradient is wanted: differentiate the operations
            inputs = (input, weight, bias, residual)
            wanted = [t for t, needed in zip(inputs, needs, strict=True) if needed]
            mask = mask if dropped is None else mask_of(dropped, input)
            output = _kn_conv_composite(*inputs, mask, ctx.settings)
            found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
            return *(next(found) if needed else None for needed in needs), *nothing

        with torch.autocast(grad.device.type, enabled=False):  # whatever backward itself is called under
            parts = [
                _gradients(part, needs, ctx.kept_output, ctx.settings, grad, *ctx.saved_tensors)
                for part in _slices(kept)
            ]
        d_input, d_weight, d_bias = parts[0]
        if len(parts) > 1:
            d_inputs, d_weights, d_biases = zip(*parts, strict=True)
            d_input = torch.cat(d_inputs) if needs[0] else None
            d_weight = sum(d_weights) if needs[1] else None
            d_bias = sum(d_biases) if needs[2] else None
        return d_input, d_weight, d_bias, grad if needs[3] else None, *nothing


def _slices(output: Tensor) -> list[slice]:
    """Cut a batch of outputs so that temporaries of their size are not large."""
    samples = output.shape[0]
    pieces = -(-output.nbytes // _LARGE) if output.device.type == "cpu" else 1
    step = max(1, -(-samples // max(pieces, 1)))
    return [slice(start, start + step) for start in range(0, max(samples, 1), step)]


def _restrict(dropped: Tensor, input: Tensor, part: slice) -> Tensor:
    """Select the dropped positions that lie in a slice of the samples, counted from its beginning."""
    size = input[0].numel() if len(input) else 0
    first, last = torch.searchsorted(dropped, torch.tensor([part.start * size, part.stop * size])).tolist()
    return dropped[first:last].long().sub_(part.start * size)


def _gradients(
    part: slice,
    needs: tuple[bool, ...],
    kept_output: bool,
    settings: _Settings,
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    dropped: Tensor | None,
    kept: Tensor,
    mean: Tensor,
    rstd: Tensor,
    sums: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of input, weight and bias from a slice of the samples; see :class:`_KNConv`."""
    dropped = None if dropped is None else _restrict(dropped, input, part)
    grad, input, kept, mean, rstd = (t[part] for t in (grad, input, kept, mean, rstd))
    residual, mask = (None if t is None else t[part] for t in (residual, mask))
    stride, pads, groups, dropout_p, inflation, _, relu_input, relu_output = settings
    x = input.relu() if relu_input else input
    dtype, spatial = mean.dtype, weight.dim() - 2
    d_bias = scratch = None
    grad, kept = grad.to(dtype), kept.to(dtype)
    if needs[0]:  # first what runs over grad * kept: behind a ReLU, kept is 0 wherever grad is to become 0
        scratch = torch.mul(kept, grad) if residual is None else torch.sub(kept, residual).mul_(grad)
        d_rstd = scratch.sum(1, keepdim=True)
    if relu_output:
        if scratch is None or scratch.stride() != grad.stride():
            scratch = torch.empty_like(grad)
        grad = torch.ops.aten.threshold_backward.grad_input(grad, kept, 0, grad_input=scratch)
    if needs[2] and bias is not None:
        d_bias = grad.sum((0, *range(2, 2 + spatial))).to(bias.dtype)
    if needs[0]:
        vectors = [sums, bias.to(dtype)] if kept_output and bias is not None else [sums]
        over_filters = _over_filters(grad, torch.stack(vectors))
        if len(vectors) == 2:
            d_rstd -= over_filters[:, 1:]
        d_var = d_rstd.mul_(rstd.square() if kept_output else rstd**3).mul_(-0.5)
        d_mean = 2.0 * (inflation - 1.0) * d_var * mean - over_filters[:, :1] * rstd
        d_var = inflation * d_var
        maps = torch.cat((d_mean - 2.0 * d_var * mean, 2.0 * d_var), 1)
    d_sums = _over_positions(grad, mean * rstd).neg_()
    scaled = torch.mul(grad, rstd, out=scratch)
    padded, padding = _convolution_padding(x, pads)
    d_input, d_weight, _ = torch.ops.aten.convolution_backward(
        scaled.to(weight.dtype), padded, weight, None, stride, padding,
        (1,) * spatial, False, (0,) * spatial, groups, (needs[0], needs[1], False),
    )  # fmt: skip
    if needs[1]:
        d_weight += d_sums.to(weight.dtype).view(-1, *(1,) * (1 + spatial))
    if needs[0]:
        if padded is not x:
            d_input = F.pad(d_input, [-p for p in pads])
        share = 1.0 if mask is None and dropped is None else 1.0 - dropout_p
        kernel_size = tuple(weight.shape[2:])
        maps /= x.shape[1] * math.prod(kernel_size) * share
        constant, slope = windows_transposed(maps, x.shape[2:], kernel_size, stride, pads).split(1, 1)
        slope = slope / share
        d_input, values = d_input.to(dtype), x.to(dtype)
        if mask is not None:
            d_input += torch.addcmul(constant, slope, values).mul_(mask)
        else:
            if dropped is not None:  # these elements have no part in the statistics
                if d_input.stride() != x.stride():  # a channels-last weight makes it so; positions are those of x
                    d_input = torch.empty_like(values).copy_(d_input)
                in_memory = in_memory_order(d_input)
                untouched = in_memory.take(dropped)
            d_input.addcmul_(slope, values).add_(constant)
            if dropped is not None:
                in_memory.put_(dropped, untouched)
        if relu_input:
            torch.ops.aten.threshold_backward.grad_input(d_input, values, 0, grad_input=d_input)
        d_input = d_input.to(input.dtype)
    return d_input, d_weight, d_bias
