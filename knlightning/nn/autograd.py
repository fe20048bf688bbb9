"""The kernel normalized convolution as an operation for autograd, with its gradient in closed form."""

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from knlightning.nn.composite import (
    Settings,
    composite_gradients,
    convolution_gradients,
    convolve,
    filter_sums,
    is_channels_last,
    per_filter,
)
from knlightning.nn.dropout import in_memory_order, mask_of
from knlightning.nn.kept_results import KeptResult
from knlightning.nn.statistics import inflate, pixel_moments, pixel_moments_by_sums, window_moments, windows_transposed

_LARGE = 16 * 2**20
"""Bytes of a temporary on a CPU: larger ones leave the caches, and are new pages, whose first touch is expensive."""


class Saved(NamedTuple):
    """The tensors that `KNConvFunction` keeps for its backward pass.

    Attributes:
        input: Its input [N, C, *spatial], before `relu_input`.
        mean: Means of the windows [N, 1, *positions].
        rstd: 1 / sqrt(var + eps) of the windows [N, 1, *positions].
        weight: Filters [O, C / groups, *kernel].
        bias: Tensor [O], or None.
        residual: Tensor [N, O, *positions], or None.
        mask: Bool tensor of the input's shape, or None.
        dropped: Positions of dropped elements, or None.
        kept: The output, or the centred result of the convolution: [N, O, *positions]; None while the context has it,
            and where it is not needed.
        sums: Sums of the filters [O].
    """

    input: Tensor
    mean: Tensor
    rstd: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    mask: Tensor | None
    dropped: Tensor | None
    kept: Tensor | None
    sums: Tensor

    def select(self, part: slice) -> "Saved":
        """Restrict to a slice of the samples."""
        residual, mask, kept = (None if t is None else t[part] for t in (self.residual, self.mask, self.kept))
        dropped = None if self.dropped is None else _restrict(self.dropped, self.input, part)
        input, mean, rstd = (t[part] for t in (self.input, self.mean, self.rstd))
        return Saved(input, mean, rstd, self.weight, self.bias, residual, mask, dropped, kept, self.sums)


class KNConvFunction(torch.autograd.Function):
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
        settings: Settings,
    ) -> Tensor:
        x = input.relu() if settings.relu_input else input
        if x.device.type == "cpu" and mask is None:
            pixels = pixel_moments_by_sums(x, dropped, settings.dropout_p)
        else:
            pixels = pixel_moments(x, mask, settings.dropout_p)
        mean, var = inflate(*window_moments(*pixels, settings.window), settings.inflation)
        rstd = torch.rsqrt(var + settings.eps)
        sums = filter_sums(weight, mean.dtype)
        undropped = mask is None and dropped is None and weight.dtype == mean.dtype
        if undropped and settings.groups == 1 and mean.numel() * weight.shape[0] > 2 * weight.numel():
            # the mean is that of all a filter sees: centre the filters, which are smaller than the result
            centre = sums.div(weight[0].numel()).to(weight.dtype).view(-1, *(1,) * (weight.dim() - 1))
            kept = convolve(x, weight - centre, settings)
            dtype, kept = kept.dtype, kept.to(mean.dtype)
        else:
            kept = convolve(x, weight, settings)
            dtype = kept.dtype
            kept = kept.to(mean.dtype).addcmul_(mean, per_filter(sums, weight), value=-1.0)
        shift = rstd.new_zeros(()) if bias is None else per_filter(bias, weight)
        output = torch.addcmul(shift, kept, rstd, out=kept if keep_output else None)
        if residual is not None:
            output.add_(residual)
        if settings.relu_output:
            output.relu_()
        output = output.to(dtype)
        if not keep_output and ctx.needs_input_grad[0]:
            ctx.kept = KeptResult(kept.to(dtype), output)
        shown = output if keep_output else None
        ctx.save_for_backward(*Saved(input, mean, rstd, weight, bias, residual, mask, dropped, shown, sums))
        ctx.kept_output, ctx.settings = keep_output, settings
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = Saved(*ctx.saved_tensors)
        needs = ctx.needs_input_grad[:4]
        nothing = (None,) * 4
        if torch.is_grad_enabled():  # a graph of the gradient is wanted: differentiate the operations
            inputs = (saved.input, saved.weight, saved.bias, saved.residual)
            mask = saved.mask if saved.dropped is None else mask_of(saved.dropped, saved.input)
            return *composite_gradients(inputs, mask, grad, needs, ctx.settings), *nothing

        # whatever backward itself is called under; for the meta device there is no autocast
        with nullcontext() if grad.is_meta else torch.autocast(grad.device.type, enabled=False):
            kept_output, kept = ctx.kept_output, saved.kept
            if kept is None:
                kept, kept_output = ctx.kept.take(grad) if needs[0] else (grad, False)  # else it is not read
            if kept is None:
                kept, kept_output = _centred(saved, ctx.settings), False
            saved = saved._replace(kept=kept)
            parts = [
                _gradients(grad[part], saved.select(part), needs, kept_output, ctx.settings) for part in _slices(kept)
            ]
        d_input, d_weight, d_bias = parts[0]
        if len(parts) > 1:
            d_inputs, d_weights, d_biases = zip(*parts, strict=True)
            d_input = torch.cat(d_inputs) if needs[0] else None
            d_weight = sum(d_weights) if needs[1] else None
            d_bias = sum(d_biases) if needs[2] else None
        return d_input, d_weight, d_bias, grad if needs[3] else None, *nothing


def _centred(saved: Saved, settings: Settings) -> Tensor:
    """Compute the centred result of the convolution again."""
    convolved = convolve(saved.input.relu() if settings.relu_input else saved.input, saved.weight, settings)
    sums = per_filter(saved.sums, saved.weight)
    return convolved.to(saved.mean.dtype).addcmul_(saved.mean, sums, value=-1.0).to(convolved.dtype)


def _gradients(
    grad: Tensor, saved: Saved, needs: tuple[bool, ...], kept_output: bool, settings: Settings
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of input, weight and bias from a slice of the samples; see `KNConvFunction`.

    Temporaries of the output's size share one tensor.
    """
    weight, bias, mean, rstd = saved.weight, saved.bias, saved.mean, saved.rstd
    assert saved.kept is not None
    x = saved.input.relu() if settings.relu_input else saved.input
    dtype, spatial = mean.dtype, weight.dim() - 2
    d_input = d_weight = d_bias = scratch = maps = d_sums = None
    grad, kept = grad.to(dtype), saved.kept.to(dtype)
    if needs[0]:  # first what runs over grad * kept: behind a ReLU, kept is 0 wherever grad is to become 0
        scratch = torch.mul(kept, grad) if saved.residual is None else torch.sub(kept, saved.residual).mul_(grad)
        d_rstd = scratch.sum(1, keepdim=True)
    if settings.relu_output:
        if scratch is None or scratch.stride() != grad.stride():
            scratch = torch.empty_like(grad)
        grad = torch.ops.aten.threshold_backward.grad_input(grad, kept, 0, grad_input=scratch)
    if needs[2] and bias is not None:
        d_bias = grad.sum((0, *range(2, 2 + spatial))).to(bias.dtype)
    if needs[0]:
        maps = _statistics_gradient(grad, d_rstd, saved, kept_output, settings)
    if needs[1]:
        d_sums = _over_positions(grad, mean * rstd).neg_()
    scaled = torch.mul(grad, rstd, out=scratch)
    d_input, d_weight, _ = convolution_gradients(
        scaled.to(weight.dtype), x, weight, settings, (needs[0], needs[1], False)
    )
    if d_sums is not None:
        d_weight += d_sums.to(weight.dtype).view(-1, *(1,) * (1 + spatial))
    if maps is not None:
        d_input = _add_statistics_gradient(d_input.to(dtype), x.to(dtype), maps, saved, settings)
        d_input = d_input.to(saved.input.dtype)
    return d_input, d_weight, d_bias


def _statistics_gradient(grad: Tensor, d_rstd: Tensor, saved: Saved, kept_output: bool, settings: Settings) -> Tensor:
    """Compute d_mean - 2 * d_var * mean and 2 * d_var, [N, 2, *positions]; d_rstd is overwritten."""
    mean, rstd, bias, inflation = saved.mean, saved.rstd, saved.bias, settings.inflation
    vectors = [saved.sums, bias.to(mean.dtype)] if kept_output and bias is not None else [saved.sums]
    over_filters = _over_filters(grad, torch.stack(vectors))
    if len(vectors) == 2:
        d_rstd -= over_filters[:, 1:]
    d_var = d_rstd.mul_(rstd.square() if kept_output else rstd**3).mul_(-0.5)
    d_mean = 2.0 * (inflation - 1.0) * d_var * mean - over_filters[:, :1] * rstd
    d_var = inflation * d_var
    return torch.cat((d_mean - 2.0 * d_var * mean, 2.0 * d_var), 1)


def _add_statistics_gradient(d_input: Tensor, x: Tensor, maps: Tensor, saved: Saved, settings: Settings) -> Tensor:
    """Add the gradient through the statistics to that through the convolution, in place; then pass the ReLU."""
    mask, dropped, window = saved.mask, saved.dropped, settings.window
    kept_share = 1.0 if mask is None and dropped is None else 1.0 - settings.dropout_p
    maps /= x.shape[1] * math.prod(window.kernel_size) * kept_share
    constant, slope = windows_transposed(maps, x.shape[2:], window).split(1, 1)
    slope = slope / kept_share
    if mask is not None:
        d_input += torch.addcmul(constant, slope, x).mul_(mask)
    else:
        if dropped is not None:  # these elements have no part in the statistics
            if d_input.stride() != x.stride():  # a channels-last weight makes it so; positions are those of x
                d_input = torch.empty_like(x).copy_(d_input)
            in_memory = in_memory_order(d_input)
            untouched = in_memory.take(dropped)
        d_input.addcmul_(slope, x).add_(constant)
        if dropped is not None:
            in_memory.index_copy_(0, dropped, untouched)  # put_ refuses to run if torch is to be deterministic
    if settings.relu_input:
        torch.ops.aten.threshold_backward.grad_input(d_input, x, 0, grad_input=d_input)
    return d_input


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


def _over_filters(grad: Tensor, vectors: Tensor) -> Tensor:
    """Sum grad [N, O, *positions] times each of the vectors [K, O] over the filters; shape [N, K, *positions]."""
    if is_channels_last(grad):
        return F.linear(grad.movedim(1, -1), vectors).movedim(-1, 1)
    return torch.matmul(vectors, grad.flatten(2)).unflatten(2, grad.shape[2:])


def _over_positions(grad: Tensor, map: Tensor) -> Tensor:
    """Sum grad [N, O, *positions] times a map [N, 1, *positions] over samples and positions; shape [O]."""
    return torch.bmm(map.flatten(2), grad.flatten(2).transpose(1, 2)).sum((0, 1))
