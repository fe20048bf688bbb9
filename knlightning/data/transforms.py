"""Augmentation of whole batches at once, on the device the batch lies on.

Every image gets random numbers of its own, drawn from torch's global generator of that device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Shift every image by its own random offset: zero padding on all sides, then a crop of the old size.

    Args:
        images: `(N, C, H, W)`, uint8 or float.
        padding: Pixels added on each side, at least 0. The offsets of the crop are uniform on 0 to `2 * padding`,
            vertically and horizontally.

    Returns:
        Tensor of the same shape and dtype.

    Raises:
        ValueError: `padding` is negative.
    """
    if padding < 0:
        raise ValueError(f"padding={padding}: must be 0 or more pixels.")
    count, channels, height, width = images.shape
    device = images.device
    top, left = torch.randint(0, 2 * padding + 1, (2, count, 1, 1, 1), device=device)
    rows = top + torch.arange(height, device=device).view(-1, 1)
    columns = left + torch.arange(width, device=device)
    image = torch.arange(count, device=device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=device).view(-1, 1, 1)
    return F.pad(images, [padding] * 4)[image, channel, rows, columns]


def random_horizontal_flip(images: Tensor) -> Tensor:
    """Mirror every image left to right with probability 1/2.

    Args:
        images: `(N, C, H, W)`, uint8 or float.

    Returns:
        Tensor of the same shape and dtype.
    """
    flipped = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(flipped, images.flip(-1), images)
