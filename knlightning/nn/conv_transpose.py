"""Kernel normalized transposed convolutions.

A transposed convolution of stride s consists of ordinary ones of stride 1, s in each dimension, one for every s-th
element of the output (Shi et al., CVPR 2016). Each of them sees other elements of the filter. Here each of them is a
kernel normalized convolution: an element of the output is normalized by the part of the input that it is computed
from. As there, windows reach over the border of the input, into zeros.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from knlightning.checks import check
from knlightning.nn.conv import _KNConv
from knlightning.nn.dropout import draw_mask
from knlightning.nn.functional import EvalStatistics, kn_conv
from knlightning.nn.windows import check_input, per_dimension


def kn_conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dropout_p: float = 0.05,
    training: bool = True,
    eval_statistics: EvalStatistics = "expected",
    eps: float = 1e-5,
    mask: Tensor | None = None,
    *,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Compute a transposed convolution of which each element is normalized by the input that it is computed from.

    With stride 1 it is `knlightning.nn.kn_conv` of the flipped filters. Elements of the output that no element of the
    filter reaches, as with a stride above the kernel size, are the bias. One dropout mask is drawn at each call.

    Args:
        input: Floating point tensor [N, C, *spatial] with one to three spatial dimensions.
        weight: Filters [C, O / groups, *kernel], as of `torch.nn.functional.conv_transpose2d`.
        bias: Tensor [O], or None.
        stride: One number or one for each spatial dimension.
        padding: Elements that are cut off on each side of the output, likewise.
        output_padding: Elements that are added to the output at the end of each spatial dimension, likewise.
        groups: Number of blocked connections between channels; the statistics are over all channels anyway.
        dropout_p: As in `knlightning.nn.kn_conv`, as the arguments that follow.
        training: Whether a dropout mask is drawn.
        eval_statistics: The moments used when not training.
        eps: Added to the variance.
        mask: Bool tensor of the input's shape to use in place of a drawn mask, true where an element is kept.
        dilation: Step between the elements of the filter, one number or one for each spatial dimension.

    Returns:
        Tensor [N, O, *((size - 1) * stride - 2 * padding + dilation * (k - 1) + output_padding + 1)].

    Raises:
        TypeError: If the input is not a floating point tensor.
        ArgumentError: If an argument is out of its range, or the filters do not fit the input.
    """
    spatial = weight.dim() - 2
    check_input(input.shape, input.dtype, spatial)
    fits = groups >= 1 and weight.shape[0] == input.shape[1] and weight.shape[0] % groups == 0
    allowed = f"[C, O / groups, *kernel] with C = {input.shape[1]} input channels, a multiple of the groups ({groups})"
    check(fits, "weight's shape", tuple(weight.shape), allowed)
    steps = per_dimension(stride, spatial, "stride", 1)
    cut = per_dimension(padding, spatial, "padding", 0)
    more = per_dimension(output_padding, spatial, "output_padding", 0)
    gaps = per_dimension(dilation, spatial, "dilation", 1)
    each = zip(input.shape[2:], steps, cut, gaps, weight.shape[2:], more, strict=True)
    sizes = [(n - 1) * s - 2 * p + d * (k - 1) + extra + 1 for n, s, p, d, k, extra in each]
    check(min(sizes) > 0, "padding", padding, f"so small that something is left of the output, here {tuple(sizes)}")
    if mask is None and dropout_p > 0 and (training or eval_statistics == "sampled"):
        mask = draw_mask(input, dropout_p)
    flipped = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(tuple(range(2, 2 + spatial)))
    by_dim = [
        [_part(start + cut[i], steps[i], gaps[i], weight.shape[2 + i]) for start in range(steps[i])]
        for i in range(spatial)
    ]
    counts = [math.ceil(size / s) for size, s in zip(sizes, steps, strict=True)]
    outputs: list[Tensor | None] = []
    for combination in itertools.product(*by_dim):
        parts = [part for part in combination if part is not None]
        if len(parts) < spatial:
            outputs.append(None)
            continue
        pads = []
        for n, count, (_, first, last) in zip(input.shape[:1:-1], counts[::-1], parts[::-1], strict=True):
            pads += [-first, last + count - n]
        outputs.append(
            kn_conv(
                F.pad(input, pads),
                flipped[:, :, *(elements for elements, _, _ in parts)],
                bias,
                groups=groups,
                dropout_p=dropout_p,
                training=training,
                eval_statistics=eval_statistics,
                eps=eps,
                mask=None if mask is None else F.pad(mask, pads, value=True),
                dilation=[d // math.gcd(d, s) for d, s in zip(gaps, steps, strict=True)],
            )
        )
    return _interleave(outputs, bias, steps, sizes)


def _interleave(outputs: list[Tensor | None], bias: Tensor | None, steps: tuple[int, ...], sizes: list[int]) -> Tensor:
    """Lay the outputs of the ordinary convolutions into each other; those without filters are the bias."""
    spatial = len(steps)
    example = next(output for output in outputs if output is not None)
    empty = example.new_zeros(()) if bias is None else bias.to(example.dtype).view(-1, *(1,) * spatial)
    stacked = torch.stack([empty.expand_as(example) if output is None else output for output in outputs])
    # [s1 * s2, N, O, p1, p2] -> [s1, s2, N, O, p1, p2] -> [N, O, p1, s1, p2, s2] -> [N, O, p1 * s1, p2 * s2]
    order = [spatial, spatial + 1] + [d for i in range(spatial) for d in (spatial + 2 + i, i)]
    result = stacked.unflatten(0, steps).permute(order)
    for i, size in enumerate(sizes):
        result = result.flatten(2 + i, 3 + i).narrow(2 + i, 0, size)
    return result


def _part(start: int, stride: int, dilation: int, kernel_size: int) -> tuple[slice, int, int] | None:
    """Describe the convolution that computes every `stride`-th element of the output, in one dimension.

    Args:
        start: Place of the first of these elements, before `padding` is cut off.
        stride: Stride of the transposed convolution.
        dilation: Step between the elements of its filter.
        kernel_size: Their number.

    Returns:
        Elements of the flipped filter, and the first and the last element of the input that its first window meets;
        None if the filter has no elements there.
    """
    taps = [k for k in range(kernel_size) if (start - k * dilation) % stride == 0]
    if not taps:
        return None
    elements = slice(kernel_size - 1 - taps[-1], kernel_size - taps[0], stride // math.gcd(dilation, stride))
    return elements, (start - taps[-1] * dilation) // stride, (start - taps[0] * dilation) // stride


class _KNConvTranspose(_KNConv):
    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dropout_p: float = 0.05,
        eps: float = 1e-5,
        eval_statistics: EvalStatistics = "expected",
        *,
        dilation: int | Sequence[int] = 1,
    ) -> None:
        padding = per_dimension(padding, self.spatial, "padding", 0)
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, groups, bias, dropout_p, eps, eval_statistics),
            dilation=dilation,
        )
        self.output_padding = per_dimension(output_padding, self.spatial, "output_padding", 0)

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override] # without what may surround a convolution
        """Normalize and convolve, see `kn_conv_transpose`.

        Args:
            input: Floating point tensor (N, in_channels, ...) with a length, height and width, or depth too.

        Returns:
            Tensor (N, out_channels, ...).
        """
        return kn_conv_transpose(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,  # type: ignore[arg-type] # numbers, as the constructor has them
            self.output_padding,
            self.groups,
            self.dropout_p,
            self.training,
            self.eval_statistics,
            self.eps,
            dilation=self.dilation,
        )


class KNConvTranspose1d(_KNConvTranspose):
    """Kernel normalized transposed convolution of sequences [N, C, L]; see `KNConvTranspose2d`."""

    spatial = 1


class KNConvTranspose2d(_KNConvTranspose):
    """Transposed convolution of which each element is normalized by the part of the input that it is computed from.

    Maps [N, in_channels, H, W] to [N, out_channels, h, w], as `torch.nn.ConvTranspose2d` does, whose state dict it has.
    It takes the place of one and of its normalization; see `kn_conv_transpose` for what is computed.

    Args:
        in_channels: Number of channels of the input.
        out_channels: Number of channels of the output.
        kernel_size: Size of the filter, one number or one for each dimension.
        stride: Step between the places of the filter on the output, one number or one for each dimension.
        padding: Elements that are cut off on each side of the output, one number or one for each dimension.
        output_padding: Elements that are added to the output at the end, one number or one for each dimension.
        groups: Number of blocked connections between channels; the statistics are over all channels anyway.
        bias: Whether to add a bias.
        dropout_p: As in `KNConv2d`.
        eps: Added to the variance.
        eval_statistics: As in `KNConv2d`.
        dilation: Step between the elements of the filter, one number or one for each dimension.

    Raises:
        ArgumentError: If an argument is out of its range.
    """

    spatial = 2


class KNConvTranspose3d(_KNConvTranspose):
    """Kernel normalized transposed convolution of volumes [N, C, D, H, W]; see `KNConvTranspose2d`."""

    spatial = 3
