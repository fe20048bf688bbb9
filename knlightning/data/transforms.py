"""Augmentation of whole batches at once, on the device the batch lies on.

Every image gets random numbers of its own, drawn from torch's global generator of that device.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from knlightning.checks import check_number

ATTEMPTS = 10
"""How many rectangles are drawn for an image, of which the first that fits is erased."""


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Shift every image by its own random offset: zero padding on all sides, then a crop of the old size.

    Args:
        images: `(N, C, H, W)`, uint8 or float.
        padding: Pixels added on each side, at least 0. The offsets of the crop are uniform on 0 to `2 * padding`,
            vertically and horizontally.

    Returns:
        Tensor of the same shape and dtype.

    Raises:
        ArgumentError: If `padding` is negative.
    """
    check_number("padding", padding, at_least=0, integer=True)
    count, channels, height, width = images.shape
    device = images.device
    top, left = torch.randint(0, 2 * padding + 1, (2, count), device=device)
    if count == 0:
        return images
    padded = F.pad(images, [padding] * 4).contiguous()
    rows, columns = padded.shape[2:]
    # The rows of all crops are found by where they begin in memory, and copied whole: far faster than pixel by pixel
    corners = (torch.arange(count, device=device) * channels * rows + top) * columns + left
    lines = torch.arange(channels, device=device).view(-1, 1) * rows + torch.arange(height, device=device)
    starts = corners.view(-1, 1) + lines.view(-1) * columns
    return padded.view(-1).unfold(0, width, 1).index_select(0, starts.view(-1)).view(images.shape)


def random_horizontal_flip(images: Tensor) -> Tensor:
    """Mirror every image left to right with probability 1/2.

    Args:
        images: `(N, C, H, W)`, uint8 or float.

    Returns:
        Tensor of the same shape and dtype.
    """
    flipped = torch.rand(len(images), device=images.device) < 0.5
    both = torch.cat([images, images.flip(-1)])
    return both.index_select(0, torch.arange(len(images), device=images.device) + len(images) * flipped)


def random_erasing(images: Tensor, probability: float, colour: Sequence[float]) -> Tensor:
    """Fill a random rectangle of every image with a colour, with a probability.

    The rectangle has 2 to 33 % of the area and an aspect ratio of 0.3 to 3.3, as torchvision's `RandomErasing` draws
    it. Source: Z. Zhong et al., Random Erasing Data Augmentation, AAAI 2020.

    Args:
        images: `(N, C, H, W)`, uint8 or float.
        probability: From 0 to 1.
        colour: Of each channel.

    Returns:
        Tensor of the same shape and dtype.

    Raises:
        ArgumentError: If the probability is out of range.
    """
    check_number("probability", probability, at_least=0, at_most=1)
    count, _, height, width = images.shape
    device = images.device
    areas, ratios = torch.rand(2, count, ATTEMPTS, device=device)
    areas = height * width * (0.02 + (0.33 - 0.02) * areas)
    ratios = torch.exp(math.log(0.3) + (math.log(3.3) - math.log(0.3)) * ratios)
    heights, widths = (areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()
    fits = (heights < height) & (widths < width)
    first = fits.int().argmax(1, keepdim=True)  # attempts that do not fit do not count
    erased, *corner = torch.rand(3, count, 1, device=device)
    inside = []
    for place, lengths, total in zip(corner, (heights, widths), (height, width), strict=True):
        length = lengths.gather(1, first)
        start = (place * (total - length + 1)).floor()
        pixels = torch.arange(total, device=device)
        inside.append((pixels >= start) & (pixels < start + length))
    rows, columns = inside
    rows = rows & fits.any(1, keepdim=True) & (erased < probability)
    mask = rows[:, None, :, None] & columns[:, None, None, :]
    return torch.where(mask, torch.tensor(colour, device=device).to(images.dtype).view(-1, 1, 1), images)
