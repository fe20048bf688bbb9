"""What private training reads of a batch and of a training step, whatever the task."""

from collections.abc import Callable
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Replace every tensor of a batch.

    Args:
        batch: Tensors in tuples, lists, dicts or dataclasses that are not frozen.
        function: Makes the new tensor.

    Returns:
        A batch of the same structure.
    """
    return apply_to_collection(batch, Tensor, function)


def images_of(batch: Any) -> Tensor:
    """Return the images [N, ...] of a batch: its first tensor.

    Raises:
        ValueError: If it has no tensor.
    """
    tensors: list[Tensor] = []
    apply_to_collection(batch, Tensor, tensors.append)
    if not tensors:
        raise ValueError("a training batch must hold tensors, the images first")
    return tensors[0]


def count_samples(batch: Any, views: int) -> int:
    """Count the samples of a batch.

    Args:
        batch: Of images in which the views of a sample follow one another.
        views: Number of views of each sample.

    Raises:
        RuntimeError: If the views of a sample are not complete.
    """
    images = len(images_of(batch))
    if images % views:
        raise RuntimeError(f"privacy: {images} images came, and each sample has {views} views: one could not be read")
    return images // views


def loss_of(result: Any) -> Tensor:
    """Return the loss of what a training step returned.

    Args:
        result: A tensor, or a dict with a `loss`.

    Raises:
        ValueError: If it is None.
    """
    if result is None:
        raise ValueError(
            "training_step returned None: to leave out a step is a choice that depends on the data, which private"
            " training does not count"
        )
    loss: Tensor = result["loss"] if isinstance(result, dict) else result
    return loss
