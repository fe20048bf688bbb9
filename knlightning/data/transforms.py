"""Augmentation of whole batches at once, on the device the batch lies on.

Every image gets random numbers of its own, drawn from torch's global generator of that device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from knlightning.checks import check_number


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
