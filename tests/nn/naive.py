"""Kernel normalization by its definition: one window after the other, each with its own statistics."""

import itertools

import torch
import torch.nn.functional as F


def windows(x, kernel, stride, pads, mask, p, dilation=None, padding_mode="zeros"):
    """Cut the padded input into units; return (unit, dropped out unit) for each position.

    The mask is of the input or, if the padding is not with zeros, of the padded input.
    """
    dilation = dilation or (1,) * len(kernel)
    if padding_mode != "zeros":
        x, pads = F.pad(x, pads, padding_mode), (0,) * len(pads)
    dropped = x if mask is None else x * mask / (1 - p)
    x, dropped = F.pad(x, pads), F.pad(dropped, pads)
    each = zip(x.shape[2:], kernel, stride, dilation, strict=True)
    counts = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in each]
    cut = {}
    for position in itertools.product(*map(range, counts)):
        each = zip(position, stride, kernel, dilation, strict=True)
        where = tuple(slice(i * s, i * s + d * (k - 1) + 1, d) for i, s, k, d in each)
        cut[position] = (x[:, :, *where], dropped[:, :, *where])
    return cut


def normalize(unit, dropped, eps):
    """Normalize units [N, C, *kernel] by the moments of the dropped out units."""
    dims = tuple(range(1, unit.dim()))
    mean = dropped.mean(dims, keepdim=True)
    var = (dropped - mean).square().mean(dims, keepdim=True)
    return (unit - mean) / torch.sqrt(var + eps)


def kernel_norm(x, kernel, stride, pads, mask=None, p=0.0, eps=1e-5, dilation=None, padding_mode="zeros"):
    """Lay the normalized units side by side."""
    cut = windows(x, kernel, stride, pads, mask, p, dilation, padding_mode)
    units = {at: normalize(*pair, eps) for at, pair in cut.items()}
    counts = [max(at[i] for at in units) + 1 for i in range(len(kernel))]
    rows = dict(units)
    for i in reversed(range(len(kernel))):  # concatenate the last dimension's neighbours, then the one before
        rows = {
            at: torch.cat([rows[(*at, j)] for j in range(counts[i])], dim=2 + i)
            for at in itertools.product(*map(range, counts[:i]))
        }
    return rows[()]


def kn_conv(
    x, weight, bias, stride, pads, groups=1, mask=None, p=0.0, eps=1e-5, dilation=None, padding_mode="zeros"
):  # fmt: skip
    """Multiply each normalized unit with each filter (equation 4 of the paper)."""
    filters, depth = weight.shape[:2]
    cut = windows(x, weight.shape[2:], stride, pads, mask, p, dilation, padding_mode)
    outputs = []
    for at in sorted(cut):
        unit = normalize(*cut[at], eps)
        values = []
        for o in range(filters):
            group = o // (filters // groups)
            value = (unit[:, group * depth : (group + 1) * depth] * weight[o]).flatten(1).sum(1)
            values.append(value if bias is None else value + bias[o])
        outputs.append(torch.stack(values, 1))
    counts = [max(at[i] for at in cut) + 1 for i in range(weight.dim() - 2)]
    return torch.stack(outputs, -1).unflatten(-1, counts)


def positional_norm(x, eps=1e-5):
    """Normalize the channels of one position after the other."""
    output = torch.empty_like(x)
    for n, i, j in itertools.product(*(range(x.shape[d]) for d in (0, 2, 3))):
        values = x[n, :, i, j]
        mean = values.sum() / len(values)
        output[n, :, i, j] = (values - mean) / torch.sqrt((values - mean).square().sum() / len(values) + eps)
    return output


def local_context_norm(x, groups, window, eps=1e-5):
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
