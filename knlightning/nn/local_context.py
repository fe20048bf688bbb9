"""Local context normalization (Ortiz et al., CVPR 2020)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knlightning.checks import ArgumentError, check
from knlightning.nn.statistics import pixel_moments
from knlightning.nn.windows import per_dimension


def local_context_norm(
    input: Tensor,
    groups: int = 2,
    window: int | Sequence[int] = (227, 227),
    eps: float = 1e-5,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Normalize each group of channels at each position by its mean and biased variance in a window around it.

    The window is clipped at the borders: there the moments are of the pixels inside the image. The published code
    instead shifts such windows inwards, and takes the moments of the whole image if a side of it is not longer than
    the window's. Source: Ortiz et al. (2020), section 3.

    The moments of pixels are maps with one channel a group; sums over windows are differences of their running sums,
    so the cost does not grow with the window. These sums are taken in float64 of centred maps, and are exact to many
    digits where the mean is large beside the spread.

    Args:
        input: Floating point tensor [N, C, H, W].
        groups: Number of groups of channels. (In the published code, whose default is also 2, it is the number of
            channels in a group.)
        window: Height and width of the window, one number or two; of even ones one more pixel lies after the position
            than before.
        eps: Added to the variance.
        weight: Factors [C], or None.
        bias: Summands [C], or None.

    Returns:
        Tensor [N, C, H, W].

    Raises:
        ArgumentError: If the groups do not divide the channels, or an argument is out of its range.
    """
    if input.dim() != 4:
        raise ArgumentError("input's shape", tuple(input.shape), "[N, C, H, W]")
    sides = check_local_context(input.shape[1], groups, window)
    units = input.unflatten(1, (groups, -1)).transpose(1, 2)  # [N, C / groups, groups, H, W]
    mean, var = (m.double() for m in pixel_moments(units, None, 0.0))  # [N, 1, groups, H, W]
    # The moments about any point will do; near the mean little is lost, and no gradient passes through the choice.
    centre = mean.detach().mean((-2, -1), keepdim=True)
    mean = mean - centre
    maps = torch.cat((mean, var + mean.square()), 1)
    for dim, side in zip((-2, -1), sides, strict=True):
        maps = _window_means(maps, side, dim)
    mean, square = maps.split(1, 1)
    rstd = torch.rsqrt((square - mean.square()).clamp_min(0.0) + eps)
    shift = -(mean + centre) * rstd

    dtype = torch.promote_types(input.dtype, torch.float32)
    output = (units * rstd.to(dtype) + shift.to(dtype)).transpose(1, 2).flatten(1, 2)
    if weight is not None:
        output = output * weight.view(-1, 1, 1)
    if bias is not None:
        output = output + bias.view(-1, 1, 1)
    return output.to(input.dtype)


def check_local_context(channels: int, groups: int, window: int | Sequence[int]) -> tuple[int, ...]:
    """Check the arguments of `local_context_norm`; return the sides of the window.

    Raises:
        ArgumentError: If the groups do not divide the channels, or an argument is out of its range.
    """
    check(groups >= 1 and channels % groups == 0, "groups", groups, f"a divisor of the number of channels, {channels}")
    return per_dimension(window, 2, "window", 1)


def _window_means(maps: Tensor, side: int, dim: int) -> Tensor:
    """Average over the part inside the map of windows around each position, in one dimension."""
    size = maps.shape[dim]
    before, after = min((side - 1) // 2, size - 1), min(side // 2, size - 1)
    sums = F.pad(maps.movedim(dim, -1), (before + 1, after)).cumsum(-1)
    sums = sums[..., before + after + 1 :] - sums[..., : -(before + after + 1)]
    at = torch.arange(size, device=maps.device)
    counts = (at + after + 1).clamp_max(size) - (at - before).clamp_min(0)
    return (sums / counts).movedim(-1, dim)


class LocalContextNorm2d(nn.GroupNorm):
    """Normalize each group of channels at each position by its moments in a window around it.

    Maps [N, C, H, W] to the same shape and scales and shifts each channel. As group normalization, but in windows,
    which are clipped at the borders; see `local_context_norm`. Source: Ortiz et al. (2020).

    Args:
        channels: Number of channels of the input.
        groups: Number of groups of channels.
        window: Height and width of the window, one number or two.
        eps: Added to the variance.

    Raises:
        ArgumentError: If the groups do not divide the channels, or an argument is out of its range.
    """

    def __init__(self, channels: int, groups: int = 2, window: int | Sequence[int] = 227, eps: float = 1e-5) -> None:
        sides = check_local_context(channels, groups, window)
        super().__init__(groups, channels, eps)
        self.window = sides

    def forward(self, input: Tensor) -> Tensor:
        """Normalize images.

        Args:
            input: Floating point tensor [N, C, H, W].

        Returns:
            Tensor of the same shape.
        """
        return local_context_norm(input, self.num_groups, self.window, self.eps, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, groups={self.num_groups}, window={self.window}, eps={self.eps}"
