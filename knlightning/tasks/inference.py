"""Logits of whole images: at once or window by window, also mirrored and at several scales."""

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

Network = Callable[[Tensor], Tensor]


def averaged_logits(
    network: Network,
    images: Tensor,
    window: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
) -> Tensor:
    """Apply a network to images in one or several ways, and average the logits.

    In this order: for each scale, the images are resized (bilinear, with antialiasing); they are taken as they are
    and, with `flip`, mirrored; of each, the network sees the whole or window after window, and the logits of a pixel
    are the mean over the windows that it lies in; those of a mirrored image are mirrored back; the logits are resized
    to the size of the images (bilinear); and of all this the mean is taken. One scale of 1 without mirroring, and a
    window as large as the image, change nothing.

    Args:
        network: from images (N, C, h, w) of any size to logits (N, classes, h, w).
        images: (N, C, H, W).
        window: height and width in pixels of the resized image; None for the whole image.
        stride: vertical and horizontal step from window to window; None for half a window. The last windows end at
            the border of the image.
        flip: whether mirrored images are seen too.
        scales: factors of height and width, at least one.

    Returns:
        logits (N, classes, H, W).
    """
    ways = [(scale, mirrored) for scale in scales for mirrored in ((False, True) if flip else (False,))]

    def one(scale: float, mirrored: bool) -> Tensor:
        resized = _resized_images(images, scale)
        logits = _windowed(network, resized.flip(-1) if mirrored else resized, window, stride)
        logits = logits.flip(-1) if mirrored else logits
        if resized.shape == images.shape:
            return logits
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)

    if len(ways) == 1:
        return one(*ways[0])
    total = _accumulator(first := one(*ways[0]), images.shape[-2:]).add_(first)
    del first  # these maps are large
    for way in ways[1:]:
        total += one(*way)
    return total.div_(len(ways))


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """List where windows begin along a side, so that they cover it and the last one ends at its end.

    Args:
        size: length of the side.
        window: length of a window.
        stride: step from window to window, in [1, window].
    """
    if window >= size:
        return [0]
    return [*range(0, size - window, stride), size - window]


def _resized_images(images: Tensor, scale: float) -> Tensor:
    size = [max(1, round(side * scale)) for side in images.shape[-2:]]
    if tuple(size) == images.shape[-2:]:
        return images
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


def _windowed(
    network: Network, images: Tensor, window: tuple[int, int] | None, stride: tuple[int, int] | None
) -> Tensor:
    height, width = images.shape[-2:]
    if window is None or (window[0] >= height and window[1] >= width):
        return network(images)
    stride = stride or (-(-window[0] // 2), -(-window[1] // 2))
    rows, columns = (window_starts(*sides) for sides in zip((height, width), window, stride, strict=True))
    total: Tensor | None = None
    times = torch.zeros(height, width, device=images.device)
    for row, column in product(rows, columns):
        place = (..., slice(row, row + window[0]), slice(column, column + window[1]))
        logits = network(images[place])
        if total is None:
            total = _accumulator(logits, (height, width))
        total[place] += logits
        times[place] += 1
    assert total is not None
    return total.div_(times)


def _accumulator(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Make zeros to which logits are added, in float32 at least."""
    return logits.new_zeros((*logits.shape[:2], *size), dtype=torch.promote_types(logits.dtype, torch.float32))
