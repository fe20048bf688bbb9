"""Logits of whole images: at once, window by window or by tiles, also mirrored and at several scales."""

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 2048
"""Height and width of the tiles of a large image, in pixels."""
MARGIN = 256
"""Pixels at the inner borders of a tile that serve as surroundings alone."""


def averaged_logits(
    network: Callable[[Tensor], Tensor],
    images: Tensor,
    window: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
) -> Tensor:
    """Apply a network to images at several scales, mirrored and by windows, and average the logits.

    1. For each scale, the images are resized (bilinear, with antialiasing).
    2. With `flip`, each of them is also mirrored.
    3. The network is applied to each of them, to the whole image or window by window. The logits of a pixel are the
       mean over the windows that contain it.
    4. The logits of mirrored images are mirrored back, and all logits are resized to the size of the images (bilinear).
    5. The result is the mean of all of them.

    A single scale of 1 without mirroring, and a window as large as the image, change nothing.

    Args:
        network: Network, from images (N, C, h, w) of any size to logits (N, classes, h, w).
        images: Images (N, C, H, W).
        window: Height and width in pixels of the resized image; None for the whole image.
        stride: Vertical and horizontal step from window to window; None for half a window. The last windows end at
            the border of the image.
        flip: Whether mirrored images are used too.
        scales: Factors of height and width, at least one.

    Returns:
        Logits (N, classes, H, W).
    """
    variants = [(scale, mirrored) for scale in scales for mirrored in ((False, True) if flip else (False,))]

    def logits_of(scale: float, mirrored: bool) -> Tensor:
        resized = _resized_images(images, scale)
        logits = _windowed(network, resized.flip(-1) if mirrored else resized, window, stride)
        logits = logits.flip(-1) if mirrored else logits
        if resized.shape == images.shape:
            return logits
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)

    if len(variants) == 1:
        return logits_of(*variants[0])
    total = _accumulator(first := logits_of(*variants[0]), images.shape[-2:]).add_(first)
    del first  # these maps are large
    for variant in variants[1:]:
        total += logits_of(*variant)
    return total.div_(len(variants))


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """List where windows begin along a side, so that they cover it and the last one ends where it ends.

    Args:
        size: Length of the side.
        window: Length of a window.
        stride: Step from window to window, in [1, window].
    """
    if window >= size:
        return [0]
    return [*range(0, size - window, stride), size - window]


def grid_of_windows(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int] | None
) -> tuple[list[int], list[int]]:
    """List the rows and the columns in which windows of an image begin.

    Args:
        size: Height and width of the image.
        window: Height and width of the windows.
        stride: Vertical and horizontal step from window to window; None for half a window.
    """
    stride = stride or (-(-window[0] // 2), -(-window[1] // 2))
    rows, columns = (window_starts(*sides) for sides in zip(size, window, stride, strict=True))
    return rows, columns


def by_tiles(
    function: Callable[..., tuple[Tensor, ...]], *images: Tensor, tile: int = TILE, margin: int = MARGIN
) -> tuple[Tensor, ...]:
    """Apply a function to large images part by part, so that it needs less memory.

    The images are divided into squares of tile - 2 * margin pixels, from the top left; the last ones may be smaller.
    The function is applied to each square together with the margin around it, as far as the image reaches, and its
    results are kept in the square alone. Nothing is blended.

    So the results are those of the whole images, up to rounding, if a pixel of a result depends on no pixel further
    than the margin, and if height, width, tile and margin are multiples of all strides of the function. Otherwise every
    square is what the function makes of an image that ends at its margin.

    Args:
        function: From tensors (N, ..., h, w) of any size, as many as there are images, to tensors (N, ..., h, w).
        *images: Tensors (N, ..., H, W), such as images and the labels of their pixels.
        tile: Largest height and width the function is applied to, above twice the margin.
        margin: Pixels around a square.

    Returns:
        Tensors (N, ..., H, W).
    """
    height, width = images[0].shape[-2:]
    side = tile - 2 * margin
    results: tuple[Tensor, ...] = ()
    for row, column in product(range(0, height, side), range(0, width, side)):
        top, left = max(row - margin, 0), max(column - margin, 0)
        seen = (..., slice(top, row + side + margin), slice(left, column + side + margin))
        parts = function(*(each[seen] for each in images))
        results = results or tuple(part.new_empty((*part.shape[:-2], height, width)) for part in parts)
        for result, part in zip(results, parts, strict=True):
            square = part[..., row - top : row - top + side, column - left : column - left + side]
            result[..., row : row + side, column : column + side] = square
    return results


def _resized_images(images: Tensor, scale: float) -> Tensor:
    size = [max(1, round(side * scale)) for side in images.shape[-2:]]
    if tuple(size) == images.shape[-2:]:
        return images
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


def _windowed(
    network: Callable[[Tensor], Tensor],
    images: Tensor,
    window: tuple[int, int] | None,
    stride: tuple[int, int] | None,
) -> Tensor:
    height, width = images.shape[-2:]
    if window is None or (window[0] >= height and window[1] >= width):
        return network(images)
    rows, columns = grid_of_windows((height, width), window, stride)
    total: Tensor | None = None
    counts = torch.zeros(height, width, device=images.device)
    for row, column in product(rows, columns):
        place = (..., slice(row, row + window[0]), slice(column, column + window[1]))
        logits = network(images[place])
        if total is None:
            total = _accumulator(logits, (height, width))
        total[place] += logits
        counts[place] += 1
    assert total is not None
    return total.div_(counts)


def _accumulator(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Make zeros, in float32 at least, to which logits are added."""
    return logits.new_zeros((*logits.shape[:2], *size), dtype=torch.promote_types(logits.dtype, torch.float32))
