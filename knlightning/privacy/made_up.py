"""Batches of made-up samples for the trial steps of private training."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from knlightning.privacy.batches import images_of, map_tensors

IGNORED = (-100, 255)
"""Labels that losses often ignore."""


def random_images(batch: Any) -> Any:
    """Replace all that is floating point in a batch by random numbers of [0, 1)."""
    generator = torch.Generator().manual_seed(0)
    return map_tensors(batch, lambda p: torch.rand(p.shape, generator=generator).to(p) if p.is_floating_point() else p)


def trial_pair(batch: Any, number: int, num_classes: int, task: LightningModule) -> tuple[tuple[Any, Any], int | None]:
    """Make two batches that differ in sample 0 alone: its pixels are of a larger spread, and its label is another.

    Trial 0 has the labels of the batch. In the others each tensor of whole numbers behind the images is taken for
    labels. In turn, the other samples have random classes; all have one class; sample 0 has a label that is ignored.

    Args:
        batch: Of a few samples.
        number: Number of the trial; they go through the classes.
        num_classes: Number of classes.
        task: Whose modules, or who itself, may have an `ignore_index`.

    Returns:
        The two batches, and the label that is to be ignored, if they have one.
    """
    images = images_of(batch)
    kind = "given" if number == 0 else ("ignored", "random", "equal")[number % 3]
    # neighbours in a ring of all classes, or of some that are spread over it
    step = max(1, num_classes // 12)
    one_class, other_class = (place * step % num_classes for place in (number, number + 1))
    named = [value for m in task.modules() if isinstance(value := getattr(m, "ignore_index", None), int)]
    ignored = [*named, *IGNORED][number // 3 % len([*named, *IGNORED])]

    def first_of(part: Tensor) -> Tensor:
        """Label sample 0 of the second batch."""
        label = torch.full_like(part[0], one_class if kind == "ignored" else other_class)
        if kind == "ignored" and label.dim() and number % 2:
            label[..., label.shape[-1] // 2 :] = ignored
        elif kind == "ignored":
            label.fill_(ignored)
        return label

    def made_up(second: bool, part: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(number + 1)
        is_image, part = part is images, part.clone()
        if part.is_floating_point():
            if second:
                part[0] = part[0] + 10 * torch.rand(part[0].shape, generator=generator).pow(4).to(part)
        elif kind == "given" or is_image or part.dtype == torch.bool:
            if second:
                part[0] = part[-1]
        else:
            labels = torch.randint(num_classes, part.shape, generator=generator).to(part)
            part = torch.full_like(part, one_class) if kind == "equal" else labels
            part[0] = first_of(part) if second else one_class
        return part

    one, two = (map_tensors(batch, partial(made_up, second)) for second in (False, True))
    return (one, two), ignored if kind == "ignored" else None
