"""Mean and variance of dropped out windows over all channels, without unfolding.

By the law of total variance

    mean(window) = mean over pixels of the pixels' channel means
    var(window)  = mean over pixels of the pixels' channel variances
                   + variance over pixels of the pixels' channel means,

so one pass over the input yields two maps with one channel each, and windows over those maps yield the rest. Both
terms are centred: nothing cancels where the mean is large beside the spread.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from knlightning.nn.dropout import in_memory_order, pixels_of
from knlightning.nn.windows import Window


def statistics_dtype(input: Tensor) -> torch.dtype:
    """Return float64 for a float64 input, otherwise float32."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def pixel_moments(input: Tensor, mask: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Compute mean and biased variance over the channels of each dropped out pixel.

    Args:
        input: Tensor [N, C, *spatial].
        mask: Bool tensor of the same shape, true where an element is kept, or None.
        dropout_p: Elements kept by the mask are scaled by 1 / (1 - dropout_p).

    Returns:
        Two tensors [N, 1, *spatial], float32 or, for a float64 input, float64.
    """
    values = input.to(statistics_dtype(input))
    if mask is not None:
        values = values * mask * (1.0 / (1.0 - dropout_p))
    if values.numel() == 0:  # torch.var_mean warns about an empty tensor
        return values.sum(1, keepdim=True), values.sum(1, keepdim=True)
    var, mean = torch.var_mean(values, 1, correction=0, keepdim=True)
    return mean, var


def pixel_moments_by_sums(input: Tensor, dropped: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Compute what `pixel_moments` does from sums and sums of squares, which torch reads fastest on a CPU.

    Not differentiable. The pixels at which the difference of the two sums would cancel are computed again.

    Args:
        input: Tensor [N, C, *spatial], contiguous in the usual or the channels-last format.
        dropped: Positions of the dropped elements in memory, as by `knlightning.nn.dropout.draw_dropped`, or
            None.
        dropout_p: The other elements are scaled by 1 / (1 - dropout_p).

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
    return (mean, var) if dropped is None else _drop_out(mean, var, input, dropped, dropout_p)


def _drop_out(mean: Tensor, var: Tensor, input: Tensor, dropped: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Turn the moments of pixels into those after dropout, from the dropped elements alone."""
    channels = input.shape[1]
    positions = dropped.long()
    values = in_memory_order(input).take(positions).to(mean.dtype)
    pixels = pixels_of(positions, input)
    first = torch.zeros_like(mean, memory_format=torch.contiguous_format)
    second = torch.zeros_like(first)
    first.view(-1).index_add_(0, pixels, values)
    second.view(-1).index_add_(0, pixels, values.square())
    first, second = first.div_(channels), second.div_(channels)
    scale = 1.0 / (1.0 - dropout_p)
    var = (scale**2 * (var + 2 * mean * first - first.square() - second)).clamp_min_(0.0)
    mean = scale * (mean - first)
    if dropout_p**channels > 1e-12:  # a whole pixel may be dropped: then nothing but rounding is left of it
        emptied = torch.bincount(pixels, minlength=mean.numel()).view(mean.shape) == channels
        mean, var = mean.masked_fill_(emptied, 0.0), var.masked_fill_(emptied, 0.0)
    return mean, var


def window_moments(mean: Tensor, var: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Merge the moments of pixels into those of windows, one dimension after the other.

    Args:
        mean: Tensor [N, 1, *spatial].
        var: Tensor [N, 1, *spatial].
        window: The windows.

    Returns:
        Two tensors [N, 1, *positions].
    """
    maps = F.pad(torch.cat((mean, var), 1), window.pads)
    for i in range(len(window.kernel_size)):
        lines = [maps[(slice(None),) * (2 + i) + (at,)] for at in window.elements(i, maps.shape[2 + i])]
        maps = lines[0]
        for n, line in enumerate(lines[1:], 1):  # merge one more with n (Chan et al., 1979)
            delta = line - maps
            maps = torch.add(maps, delta, alpha=1 / (n + 1))
            maps[:, 1:].add_(delta[:, :1].square(), alpha=n / (n + 1) ** 2)
    return maps[:, :1], maps[:, 1:]


def windows_transposed(maps: Tensor, size: Sequence[int], window: Window) -> Tensor:
    """Add the value at each window's position to all of its pixels: the transpose of summing over windows.

    Args:
        maps: Tensor [N, maps, *positions].
        size: Size of the input in each spatial dimension.
        window: The windows.

    Returns:
        Tensor [N, maps, *size].
    """
    for i, (before, after) in enumerate(window.padding):
        if window.kernel_size[i] > 1 or window.stride[i] > 1 or before or after:
            shape = list(maps.shape)
            shape[2 + i] = before + size[i] + after
            spread = maps.new_zeros(shape)
            for at in window.elements(i, shape[2 + i]):
                spread[(slice(None),) * (2 + i) + (at,)] += maps
            maps = spread.narrow(2 + i, before, size[i])
    return maps


def expected_inflation(size: int, dropout_p: float) -> float:
    """Return the factor by which dropout raises the mean square of a window of `size` elements on average.

    It is (1 - p / size) / (1 - p): the mean square grows by the factor 1 / (1 - p), and the variance of the mean,
    p / (1 - p) / size of the mean square, is subtracted from it.
    """
    return (1.0 - dropout_p / size) / (1.0 - dropout_p)


def inflate(mean: Tensor, var: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Average a window's dropped out moments over all masks.

    The mean stays, and E[var'] = factor * mean(x^2) - mean^2, written so that nothing cancels.

    Args:
        mean: Tensor [N, 1, *positions].
        var: Tensor [N, 1, *positions].
        factor: The factor of `expected_inflation`; 1 changes nothing.
    """
    return (mean, var) if factor == 1.0 else (mean, factor * var + (factor - 1.0) * mean.square())
