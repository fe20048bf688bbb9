"""Mean and variance of dropped out windows over all channels, without unfolding.

By the law of total variance

    mean(window) = mean over pixels of the pixels' channel means
    var(window)  = mean over pixels of the pixels' channel variances
                   + variance over pixels of the pixels' channel means,

so one pass over the input yields two maps with one channel each, and windows over those maps yield the rest. Both
terms are centred: nothing cancels where the mean is large beside the spread.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def statistics_dtype(input: Tensor) -> torch.dtype:
    """Return float64 for a float64 input, otherwise float32."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def pixel_moments(input: Tensor, mask: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Compute mean and biased variance over the channels of each dropped out pixel.

    Args:
        input: tensor [N, C, *spatial].
        mask: bool tensor of the same shape, true where an element is kept, or None.
        dropout_p: elements kept by the mask are scaled by 1 / (1 - dropout_p).

    Returns:
        Two tensors [N, 1, *spatial], float32 or, for a float64 input, float64.
    """
    values = input.to(statistics_dtype(input))
    if mask is not None:
        values = values * mask * (1.0 / (1.0 - dropout_p))
    if values.numel() == 0:  # of which torch.var_mean warns
        return values.sum(1, keepdim=True), values.sum(1, keepdim=True)
    var, mean = torch.var_mean(values, 1, correction=0, keepdim=True)
    return mean, var


def pixel_moments_by_sums(input: Tensor, dropped: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Compute what :func:`pixel_moments` does from sums and sums of squares, which torch reads fastest on a CPU.

    Not differentiable. The pixels at which the difference of the two sums would cancel are computed again.

    Args:
        input: tensor [N, C, *spatial], contiguous in the usual or the channels-last format.
        dropped: positions of the dropped elements in memory, as by :func:`draw_dropped`, or None.
        dropout_p: the others are scaled by 1 / (1 - dropout_p).

    Returns:
        Two tensors [N, 1, *spatial], float32 or, for a float64 input, float64.
    """
    channels, dtype = input.shape[1], statistics_dtype(input)
    mean = input.sum(1, keepdim=True, dtype=dtype).div_(channels)
    square = mean.square()
    var = torch.linalg.vector_norm(input, dim=1, keepdim=True, dtype=dtype).square_().div_(channels).sub_(square)
    inexact = (var < 1e-3 * square).squeeze(1)
    if inexact.any():
        again = torch.var_mean(input.movedim(1, -1)[inexact].to(dtype), -1, correction=0)
        var.squeeze(1)[inexact], mean.squeeze(1)[inexact] = again
    if dropped is not None:
        positions = dropped.long()
        values = in_memory_order(input).take(positions).to(dtype)
        pixels = pixels_of(positions, input)
        first = torch.zeros_like(mean, memory_format=torch.contiguous_format)
        second = torch.zeros_like(first)
        first.view(-1).index_add_(0, pixels, values)
        second.view(-1).index_add_(0, pixels, values.square())
        first, second = first.div_(channels), second.div_(channels)
        scale = 1.0 / (1.0 - dropout_p)
        var = (scale**2 * (var + 2 * mean * first - first.square() - second)).clamp_min_(0.0)
        mean = scale * (mean - first)
        if dropout_p**channels > 1e-12:  # whole pixels may be dropped: then nothing but rounding is left of them
            emptied = torch.bincount(pixels, minlength=mean.numel()).view(mean.shape) == channels
            mean, var = mean.masked_fill_(emptied, 0.0), var.masked_fill_(emptied, 0.0)
    return mean, var


def window_moments(
    mean: Tensor, var: Tensor, kernel_size: tuple[int, ...], stride: tuple[int, ...], pads: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Merge the moments of pixels into those of windows, one dimension after the other.

    Args:
        mean: tensor [N, 1, *spatial].
        var: tensor [N, 1, *spatial].
        kernel_size: window size in each spatial dimension.
        stride: step between windows in each spatial dimension.
        pads: zeros around the input in the order of :func:`torch.nn.functional.pad`.

    Returns:
        Two tensors [N, 1, *positions].
    """
    maps = F.pad(torch.cat((mean, var), 1), pads)
    for i, (size, step) in enumerate(zip(kernel_size, stride, strict=True)):
        span = maps.shape[2 + i] - size + 1
        lines = [maps[(slice(None),) * (2 + i) + (slice(first, first + span, step),)] for first in range(size)]
        maps = lines[0]
        for n, line in enumerate(lines[1:], 1):  # merge one more with n (Chan et al., 1979)
            delta = line - maps
            maps = torch.add(maps, delta, alpha=1 / (n + 1))
            maps[:, 1:].add_(delta[:, :1].square(), alpha=n / (n + 1) ** 2)
    return maps[:, :1], maps[:, 1:]


def windows_transposed(
    maps: Tensor, size: Sequence[int], kernel_size: tuple[int, ...], stride: tuple[int, ...], pads: tuple[int, ...]
) -> Tensor:
    """Add what stands at each window's position to all of its pixels: the transpose of summing over windows.

    Args:
        maps: tensor [N, maps, *positions].
        size: size of the input in each spatial dimension.
        kernel_size: window size in each spatial dimension.
        stride: step between windows in each spatial dimension.
        pads: zeros around the input in the order of :func:`torch.nn.functional.pad`.

    Returns:
        Tensor [N, maps, *size].
    """
    for i, (k, step) in enumerate(zip(kernel_size, stride, strict=True)):
        before, after = pads[2 * (len(size) - 1 - i) : 2 * (len(size) - i)]
        if k > 1 or step > 1 or before or after:
            shape = list(maps.shape)
            shape[2 + i] = before + size[i] + after
            spread = maps.new_zeros(shape)
            span = shape[2 + i] - k + 1
            for first in range(k):
                spread[(slice(None),) * (2 + i) + (slice(first, first + span, step),)] += maps
            maps = spread.narrow(2 + i, before, size[i])
    return maps


def expected_inflation(size: int, dropout_p: float) -> float:
    """Return the factor by which dropout raises the mean square of a window of `size` elements on average.

    Less what the variance of the mean takes away again: (1 - p / size) / (1 - p).
    """
    return (1.0 - dropout_p / size) / (1.0 - dropout_p)


def inflate(mean: Tensor, var: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Average a window's dropped out moments over all masks.

    The mean stays, and E[var'] = factor * mean(x^2) - mean^2, written so that nothing cancels.

    Args:
        mean: tensor [N, 1, *positions].
        var: tensor [N, 1, *positions].
        factor: as by :func:`expected_inflation`; 1 changes nothing.
    """
    return (mean, var) if factor == 1.0 else (mean, factor * var + (factor - 1.0) * mean.square())


def draw_mask(input: Tensor, dropout_p: float) -> Tensor:
    """Draw a bool tensor of the input's shape, each element true with probability 1 - dropout_p."""
    return torch.empty_like(input, dtype=torch.bool).bernoulli_(1.0 - dropout_p)


def draw_dropped(count: int, dropout_p: float) -> Tensor:
    """Draw which of `count` elements are dropped, each with probability dropout_p, independently.

    The gaps between the dropped elements of such a process are geometric variates: count * dropout_p draws do in
    place of `count`.

    Returns:
        Ascending positions, int32 where they fit.
    """
    expected = count * dropout_p
    draws = int(expected + 6 * math.sqrt(expected)) + 16  # more than enough but once in a billion times
    ends = _geometric(draws, dropout_p).cumsum_(0)
    while ends[-1] <= count:
        ends = torch.cat((ends, _geometric(draws, dropout_p).cumsum_(0).add_(ends[-1])))
    ends = ends[: int(torch.searchsorted(ends, count, right=True))] - 1.0
    return ends.to(torch.int32 if count <= 2**31 else torch.int64)


def _geometric(draws: int, p: float) -> Tensor:
    """Draw numbers of trials up to the first success, by inversion; in float64, which counts exactly up to 2^53.

    Several times faster than Tensor.geometric_, which takes its logarithms one by one.
    """
    return torch.rand(draws, dtype=torch.float64).neg_().log1p_().div_(math.log1p(-p)).floor_().add_(1.0)


def in_memory_order(input: Tensor) -> Tensor:
    """View a tensor that is contiguous in the usual or the channels-last format as it lies in memory."""
    return input.view(-1) if input.is_contiguous() else input.movedim(1, -1).view(-1)


def pixels_of(positions: Tensor, input: Tensor) -> Tensor:
    """Find in which pixel, counted over [N, *spatial], elements of the input lie, given their place in memory."""
    channels, spatial = input.shape[1], math.prod(input.shape[2:])
    if not input.is_contiguous() or spatial == 1:
        return positions // channels
    return positions // (channels * spatial) * spatial + positions % spatial


def mask_of(dropped: Tensor, input: Tensor) -> Tensor:
    """Turn positions of dropped elements into a mask of the input's shape, true where an element is kept."""
    mask = torch.ones_like(input, dtype=torch.bool)
    in_memory_order(mask)[dropped] = False
    return mask
