"""Masks of dropout: drawn for each element, or as the positions of the dropped elements."""

import math

import torch
from torch import Tensor


def draw_mask(input: Tensor, dropout_p: float) -> Tensor:
    """Draw a bool tensor of the input's shape, each element true with probability 1 - dropout_p."""
    return torch.empty_like(input, dtype=torch.bool).bernoulli_(1.0 - dropout_p)


def draw_dropped(count: int, dropout_p: float) -> Tensor:
    """Draw which of `count` elements are dropped, each with probability dropout_p, independently.

    The gaps between the dropped elements are geometric variates, so that about count * dropout_p draws suffice.

    Args:
        count: Number of elements.
        dropout_p: Probability in (0, 1).

    Returns:
        Ascending positions, int32 where they fit.
    """
    expected = count * dropout_p
    draws = int(expected + 6 * math.sqrt(expected)) + 16  # too few only once in a billion times
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
    """View a tensor that is contiguous in the usual or the channels-last format in the order of its memory."""
    return input.view(-1) if input.is_contiguous() else input.movedim(1, -1).view(-1)


def pixels_of(positions: Tensor, input: Tensor) -> Tensor:
    """Find the pixels of elements of the input.

    Args:
        positions: Places of the elements in memory, as by `draw_dropped`.
        input: Tensor [N, C, *spatial], contiguous in the usual or the channels-last format.

    Returns:
        Places of their pixels, counted over [N, *spatial].
    """
    channels, spatial = input.shape[1], math.prod(input.shape[2:])
    if not input.is_contiguous() or spatial == 1:
        return positions // channels
    return positions // (channels * spatial) * spatial + positions % spatial


def mask_of(dropped: Tensor, input: Tensor) -> Tensor:
    """Make a mask of the input's shape, true where an element is kept, of the positions of dropped elements."""
    mask = torch.ones_like(input, dtype=torch.bool)
    in_memory_order(mask)[dropped] = False
    return mask
