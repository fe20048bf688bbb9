"""What private training reads of a batch and of a training step, whatever the task."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
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


def split_batch(batch: Any, count: int) -> list[Any]:
    """Divide a batch into batches of one sample each, which may have several rows, its views.

    Args:
        batch: Tensors [N, ...] in any structure, and lists of N other values.
        count: Number of samples.

    Raises:
        ValueError: If a tensor has no rows for the samples.
    """
    rows = len(images_of(batch)) // count if count else 0

    def part_of(part: Any, sample: int) -> Any:
        mine = slice(sample * rows, (sample + 1) * rows)
        if isinstance(part, Tensor):
            if part.dim() == 0 or len(part) != count * rows:
                raise _cannot_join(f"a tensor of the shape {tuple(part.shape)} in a batch of {count * rows} images")
            return part[mine]
        if _is_column(part):
            return type(part)(part[mine]) if len(part) == count * rows else part
        return _rebuilt(part, [part_of(each, sample) for each in _values(part)])

    return [part_of(batch, sample) for sample in range(count)]


def join_batches(batches: Sequence[Any]) -> Any:
    """Join batches of one sample each into one.

    Args:
        batches: At least one, all of the same structure: tensors [views, ...] and lists of other values are put one
            behind the other; anything else must be the same in all of them.

    Raises:
        ValueError: If they do not join.
    """
    first = batches[0]
    if any(type(other) is not type(first) for other in batches):
        raise _cannot_join("batches of different types")
    if isinstance(first, Tensor):
        shapes = {(part.shape[1:], part.dtype) if part.dim() else None for part in batches}
        if len(shapes) > 1 or None in shapes:
            raise _cannot_join("tensors of the shapes " + ", ".join(sorted({str(tuple(p.shape)) for p in batches})))
        return torch.cat(list(batches))
    if _is_column(first):
        return type(first)(value for part in batches for value in part)
    columns = [_values(batch) for batch in batches]
    if not columns[0]:
        if any(other != first for other in batches):
            raise _cannot_join(f"values {first!r:.50} that differ from sample to sample")
        return first
    if len({len(column) for column in columns}) > 1:
        raise _cannot_join("batches of different lengths")
    return _rebuilt(first, [join_batches(parts) for parts in zip(*columns, strict=True)])


def _is_column(part: Any) -> bool:
    """Whether a part of a batch is a list of one value for each row, such as paths."""
    return type(part) in (list, tuple) and not any(isinstance(v, (Tensor, list, tuple, Mapping)) for v in part)


def _values(part: Any) -> list[Any]:
    """List the parts of a part; none if it has none."""
    if isinstance(part, Mapping):
        return [part[key] for key in sorted(part)]
    if isinstance(part, (list, tuple)):
        return list(part)
    return [getattr(part, field.name) for field in fields(part)] if is_dataclass(part) else []


def _rebuilt(part: Any, values: list[Any]) -> Any:
    """Make a part of other values, in the order of `_values`."""
    if isinstance(part, Mapping):
        given = dict(zip(sorted(part), values, strict=True))
        return type(part)({key: given[key] for key in part})  # type: ignore[call-arg] # of dict and its like
    if isinstance(part, (list, tuple)):
        return type(part)(*values) if hasattr(part, "_fields") else type(part)(values)
    if is_dataclass(part) and not isinstance(part, type):
        return replace(part, **dict(zip([field.name for field in fields(part)], values, strict=True)))
    return part


def _cannot_join(what: str) -> ValueError:
    return ValueError(
        "private training collates each sample by itself, calls the hooks of batches for each sample by itself, and"
        f" joins the results, so that no sample changes another; here they do not join: {what}. Give each sample the"
        " same shape, and nothing that all samples of a batch share"
    )


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
