"""Scenes composed of scikit-learn's digits, with a label for each pixel."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from knlightning.data.digits import MAX_INK
from knlightning.data.segmentation import IGNORED

SCENES_PER_BLOCK = 64
"""Number of scenes that are composed at a time."""
DIGIT_SIZES = (14.0, 30.0)
"""Least and largest height of a digit in pixels, its margin included."""
PIXELS_PER_DIGIT = 800
NUM_CANDIDATES = 10
"""Random positions for a digit; it gets the one farthest from the other digits."""
DIGIT_INK, BACKGROUND_INK = 0.5, 0.25
"""Fractions of full ink: from the first on a pixel is the digit's, below the second it is the background's."""


def compose_scenes(
    ink: Tensor, labels: Tensor, num_scenes: int, size: tuple[int, int], seed: int
) -> tuple[Tensor, Tensor]:
    """Compose scenes of digits.

    Args:
        ink: uint8 `(M, 1, 8, 8)`, 0 to `MAX_INK`.
        labels: int64 `(M,)`, the digits, 0 to 9.
        num_scenes: Number of scenes `N`.
        size: `(height, width)` of a scene.
        seed: The scenes are a function of it and of the digits.

    Returns:
        Images, uint8 `(N, 3, height, width)`, and labels, uint8 `(N, height, width)`: 0 for the background, 1 to 10 for
        the digits, 255 for pixels that do not count.
    """
    blocks = [
        _compose_block(
            ink.float() / MAX_INK,
            labels,
            size,
            torch.Generator().manual_seed(int(np.random.SeedSequence([seed, block]).generate_state(1)[0])),
        )
        for block in range(math.ceil(num_scenes / SCENES_PER_BLOCK))
    ]
    images, masks = (torch.cat(parts)[:num_scenes] for parts in zip(*blocks, strict=True))
    return images, masks


def _compose_block(
    ink: Tensor, labels: Tensor, size: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Compose a block of scenes."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(SCENES_PER_BLOCK, *shape, generator=generator)

    height, width = size
    clouds = F.interpolate(uniform(0, 0.35, 3, 5, 5), size, mode="bicubic")
    images = uniform(0, 0.25, 3, 1, 1) + clouds
    masks = torch.zeros(SCENES_PER_BLOCK, height, width, dtype=torch.uint8)
    placed: list[tuple[Tensor, Tensor]] = []
    for slot in range(max(1, round(height * width / PIXELS_PER_DIGIT))):
        chosen = torch.randint(len(ink), (SCENES_PER_BLOCK,), generator=generator)
        # a fifth of the places stay empty, but no scene does
        present = uniform(0, 1) < (0.8 if slot else 1.1)
        sizes = uniform(*DIGIT_SIZES)
        centres = _choose_centres(sizes, uniform(0, 1, NUM_CANDIDATES, 2), size, placed)
        placed.append((centres, sizes * present))
        angles = uniform(-0.25, 0.25)
        rendered = _render(ink[chosen], centres, sizes, angles, size) * present.view(-1, 1, 1, 1)
        opacity = ((rendered - BACKGROUND_INK) / (DIGIT_INK - BACKGROUND_INK)).clamp(0, 1)
        images = images + opacity * (uniform(0.5, 1, 3, 1, 1) - images)
        covered = rendered.squeeze(1)
        masks[covered >= BACKGROUND_INK] = IGNORED
        masks = torch.where(covered >= DIGIT_INK, (labels[chosen] + 1).to(torch.uint8).view(-1, 1, 1), masks)
    # light from one side
    directions = uniform(0, 2 * math.pi, 1, 1)
    rows, columns = torch.linspace(-0.5, 0.5, height).view(-1, 1), torch.linspace(-0.5, 0.5, width)
    light = 0.75 + 0.35 * (directions.sin() * rows + directions.cos() * columns)
    noise = 0.06 * torch.randn(images.shape, generator=generator)
    images = images * light.unsqueeze(1) + noise
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), masks


def _choose_centres(
    sizes: Tensor, candidates: Tensor, size: tuple[int, int], placed: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Choose the centre of one digit in each scene, far from the others.

    Args:
        sizes: `(N,)`, of the digits, in pixels.
        candidates: `(N, NUM_CANDIDATES, 2)`, uniform on 0 to 1.
        size: `(height, width)` of the scenes.
        placed: Centres `(N, 2)` and sizes `(N,)` of the digits placed so far; a size of 0 stands for none.

    Returns:
        Centres `(N, 2)`, row and column in pixels, such that the digits lie within the scenes.
    """
    centres = sizes.view(-1, 1, 1) / 2 + candidates * (torch.tensor(size) - sizes.view(-1, 1, 1))
    distance = torch.full(candidates.shape[:2], math.inf)
    for other, other_sizes in placed:
        apart = (centres - other.unsqueeze(1)).norm(dim=-1) - (sizes + other_sizes).unsqueeze(1) / 2
        distance = torch.where(other_sizes.unsqueeze(1) > 0, distance.minimum(apart), distance)
    return centres[torch.arange(len(centres)), distance.argmax(1)]


def _render(ink: Tensor, centres: Tensor, sizes: Tensor, angles: Tensor, size: tuple[int, int]) -> Tensor:
    """Render one digit on each of many canvases.

    Args:
        ink: `(N, 1, 8, 8)`.
        centres: `(N, 2)`, row and column in pixels.
        sizes: `(N,)`, height and width in pixels.
        angles: `(N,)`, by which the digits are turned, in radians.
        size: `(height, width)` of the canvases.

    Returns:
        Ink on the canvases, `(N, 1, height, width)`.
    """
    height, width = size
    down, right = (torch.tensor([height / 2, width / 2]) - centres).unbind(1)
    sine, cosine = angles.sin(), angles.cos()
    # where a pixel of the canvas, -1 to 1 in both directions, lies in the digit
    rows = [
        [cosine * width, sine * height, 2 * (cosine * right + sine * down)],
        [-sine * width, cosine * height, 2 * (cosine * down - sine * right)],
    ]
    theta = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1) / sizes.view(-1, 1, 1)
    grid = F.affine_grid(theta, [len(ink), 1, height, width], align_corners=False)
    return F.grid_sample(ink, grid, align_corners=False)
