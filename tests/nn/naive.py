"""Kernel normalization by its definition: one window after the other, each with its own statistics."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def windows(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], pads: Sequence[int], mask: Tensor | None, p: float
) -> dict[tuple[int, ...], tuple[Tensor, Tensor]]:
    """Cut the padded input into units; return (unit, dropped out unit) for each position."""
    dropped = x if mask is None else x * mask / (1 - p)
    x, dropped = F.pad(x, pads), F.pad(dropped, pads)
    counts = [(size - k) // s + 1 for size, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    cut = {}
    for position in itertools.product(*map(range, counts)):
        where = tuple(slice(i * s, i * s + k) for i, s, k in zip(position, stride, kernel, strict=True))
        cut[position] = (x[:, :, *where], dropped[:, :, *where])
    return cut


def normalize(unit: Tensor, dropped: Tensor, eps: float) -> Tensor:
    """Normalize units [N, C, *kernel] by the moments of the dropped out units."""
    dims = tuple(range(1, unit.dim()))
    mean = dropped.mean(dims, keepdim=True)
    var = (dropped - mean).square().mean(dims, keepdim=True)
    return (unit - mean) / torch.sqrt(var + eps)


def kernel_norm(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    pads: Sequence[int],
    mask: Tensor | None = None,
    p: float = 0.0,
    eps: float = 1e-5,
) -> Tensor:
    """Lay the normalized units side by side."""
    units = {at: normalize(*pair, eps) for at, pair in windows(x, kernel, stride, pads, mask, p).items()}
    counts = [max(at[i] for at in units) + 1 for i in range(len(kernel))]
    rows = dict(units)
    for i in reversed(range(len(kernel))):  # concatenate the last dimension's neighbours, then the one before
        rows = {
            at: torch.cat([rows[(*at, j)] for j in range(counts[i])], dim=2 + i)
            for at in itertools.product(*map(range, counts[:i]))
        }
    return rows[()]


def kn_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    pads: Sequence[int],
    groups: int = 1,
    mask: Tensor | None = None,
    p: float = 0.0,
    eps: float = 1e-5,
) -> Tensor:
    """Multiply each normalized unit with each filter (equation 4 of the paper)."""
    filters, depth = weight.shape[:2]
    share = filters // groups
    cut = windows(x, weight.shape[2:], stride, pads, mask, p)
    outputs = {}
    for at, pair in cut.items():
        unit = normalize(*pair, eps)
        values = []
        for o in range(filters):
            group = o // share
            value = (unit[:, group * depth : (group + 1) * depth] * weight[o]).flatten(1).sum(1)
            values.append(value if bias is None else value + bias[o])
        outputs[at] = torch.stack(values, 1)
    counts = [max(at[i] for at in cut) + 1 for i in range(weight.dim() - 2)]
    stacked = torch.stack([outputs[at] for at in itertools.product(*map(range, counts))], -1)
    return stacked.reshape(*stacked.shape[:2], *counts)


def positional_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalize the channels of one position after the other."""
    output = torch.empty_like(x)
    for n, i, j in itertools.product(*(range(x.shape[d]) for d in (0, 2, 3))):
        values = x[n, :, i, j]
        mean = values.sum() / len(values)
        output[n, :, i, j] = (values - mean) / torch.sqrt((values - mean).square().sum() / len(values) + eps)
    return output


def local_context_norm(x: Tensor, groups: int, window: Sequence[int], eps: float = 1e-5) -> Tensor:
    """Normalize one group and position after the other by the pixels of its window that are inside the image."""
    depth = x.shape[1] // groups
    outputs = []
    for i, j in itertools.product(range(x.shape[2]), range(x.shape[3])):
        rows = [r for r in range(i - (window[0] - 1) // 2, i + window[0] // 2 + 1) if 0 <= r < x.shape[2]]
        columns = [c for c in range(j - (window[1] - 1) // 2, j + window[1] // 2 + 1) if 0 <= c < x.shape[3]]
        inside = x[:, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        parts = []
        for g in range(groups):
            channels = slice(g * depth, (g + 1) * depth)
            mean = inside[:, channels].mean((1, 2, 3)).unsqueeze(1)
            var = (inside[:, channels] - mean[:, :, None, None]).square().mean((1, 2, 3)).unsqueeze(1)
            parts.append((x[:, channels, i, j] - mean) / torch.sqrt(var + eps))
        outputs.append(torch.cat(parts, 1))
    return torch.stack(outputs, -1).reshape(x.shape)
