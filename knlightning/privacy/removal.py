"""What real samples change when they are removed from a step, through the whole of a run's pipeline.

A step is taken twice, with a sample and without it: dataset, collation, hooks, network, loss and clipping. Without it
there is one sample less, as if it were not there. All others keep the random numbers that they had, for two reasons:
what is drawn when a sample is read depends on the key, the step and the sample alone; and the sample to remove is the
last one of its batch, so that what hooks, network and loss draw for those before it can be repeated.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from knlightning.internals.lightning import overridden, prepared_batch
from knlightning.internals.torch import changing_draws
from knlightning.privacy.batches import images_of, loss_of, map_tensors
from knlightning.privacy.callback import DifferentialPrivacy
from knlightning.privacy.global_random import RepeatedDraws
from knlightning.privacy.stored_values import StoredValues

MAX_EMPTY_STEPS = 1000
"""Number of steps without samples in a row that are passed over."""
MANY = 1000
"""Number of values in a draw that do not come twice by chance."""


class Removals(NamedTuple):
    """What was seen while samples were removed.

    Attributes:
        changes: Norm of the change of the clipped sum, for each sample that was removed.
        excesses: Each over the bound and what rounding adds to it; 1 at most for a private step.
        moves: By how much the norm of another sample's gradient moved at most, likewise over what rounding explains.
        empty: Norm of the sum of samples that are not finite, and contribute nothing.
        stored: What a step changed in what checkpoints hold, in words; empty if it is nothing.
        public: What was drawn for the samples without the secret key, in words; empty if it is nothing.
    """

    changes: list[float]
    excesses: list[float]
    moves: list[float]
    empty: float
    stored: str
    public: str


def remove_samples(trainer: Trainer, task: LightningModule, privacy: DifferentialPrivacy, samples: int) -> Removals:
    """Remove samples of the batches of steps, one after the other.

    Args:
        trainer: In `fit`, at the start of training.
        task: The task that is trained.
        privacy: The callback, after its `on_train_start`.
        samples: Number of samples to remove.
    """
    bound, stored = privacy.sums.sensitivity, StoredValues(task)
    changes: list[float] = []
    excesses: list[float] = []
    moves: list[float] = []
    empty, said = 0.0, ""
    for number, batch in enumerate(_batches(privacy, samples)):
        with overridden(task, "log", _silent), overridden(task, "log_dict", _silent), _other_key(privacy, number):
            stored.check()
            whole, without, move = _with_and_without_last(trainer, task, privacy, batch, number)
            rounding = _precision(trainer) * math.sqrt(len(batch))
            moves.append(move / (16 * _precision(trainer)))
            changes.append(float((whole - without).norm()))
            excesses.append(changes[-1] / (bound * (1 + 1e-4 + rounding)))
            if number == 0:
                empty = float(_clipped_sum(trainer, task, privacy, batch, number, infinite=True).norm())
                public = _public_draws(trainer, task, privacy, batch, number)
        try:
            stored.check()
        except ValueError as error:
            said = str(error)
            break
    return Removals(changes, excesses, moves, empty, said, public if changes else "")


def _batches(privacy: DifferentialPrivacy, samples: int) -> Iterator[list[int]]:
    """Yield micro-batches with another sample at the end each time, of two steps or more."""
    loader, given, empty, step = privacy.loader, 0, 0, -1
    while given < samples and empty < MAX_EMPTY_STEPS:
        drawn = loader.draw(step)[:: loader.micro_batches * loader.world_size].tolist()
        step, empty = step - 1, 0 if drawn else empty + 1  # numbers of steps that the run will not use
        for place in range(min(len(drawn), math.ceil(samples / 2), samples - given)):
            given += 1
            yield [*drawn[:place], *drawn[place + 1 :], drawn[place]]


def _with_and_without_last(
    trainer: Trainer, task: LightningModule, privacy: DifferentialPrivacy, batch: Sequence[int], step: int
) -> tuple[Tensor, Tensor, float]:
    """Sum the clipped gradients of a batch, and of the same without its last sample.

    Returns:
        The two sums, and by how much the norm of another sample's gradient moved at most, relative to itself; to a
        hundredth of the largest if it is smaller.
    """
    draws = RepeatedDraws()
    with draws.noted():
        whole = _clipped_sum(trainer, task, privacy, batch, step)
    norms = privacy.sums.norms
    with draws.repeated():
        without = _clipped_sum(trainer, task, privacy, batch[:-1], step)
    if len(norms) != len(batch) or len(batch) < 2:  # a sample was damaged, or there is no other
        return whole, without, 0.0
    others, moved = norms[:-1], (norms[:-1] - privacy.sums.norms).abs()
    kept = others.isfinite()
    relative = (
        moved[kept] / torch.maximum(others[kept], 0.01 * others[kept].amax()) if bool(kept.any()) else moved[kept]
    )
    return whole, without, float(relative.nan_to_num(0.0, math.inf).amax()) if len(relative) else 0.0


def _public_draws(
    trainer: Trainer, task: LightningModule, privacy: DifferentialPrivacy, batch: Sequence[int], step: int
) -> str:
    """Look for random numbers that do not change with the secret key, or change with the global seed."""
    seen = []
    for key, seed in ((0, 0), (0, 1), (1, 0)):
        with _other_key(privacy, key), torch.random.fork_rng():
            torch.manual_seed(seed)
            drawn: list[Tensor] = []
            with changing_draws(lambda values, drawn=drawn: drawn.append(values.double().flatten().cpu())):  # type: ignore[misc]
                _clipped_sum(trainer, task, privacy, batch, step)
            seen.append([torch.cat(drawn or [torch.zeros(0)]), *(values for values in drawn if len(values) > MANY)])
    first, other_seed, other_key = seen
    if any(not _same(a, b) for a, b in zip(first, other_seed, strict=False)):
        return "depend on the global seed, which is public"
    if any(_same(a, b) and bool((a != a[0]).any()) for a, b in zip(first, other_key, strict=False) if len(a)):
        return "are the same for another secret key"
    return ""


def _same(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and bool((one == two).all())


def _clipped_sum(
    trainer: Trainer,
    task: LightningModule,
    privacy: DifferentialPrivacy,
    samples: Sequence[int],
    step: int,
    infinite: bool = False,
) -> Tensor:
    """Read a batch and run it as the training does, and return the sum of its clipped gradients.

    Args:
        trainer: In `fit`.
        task: The task that is trained.
        privacy: The callback.
        samples: Numbers of the samples.
        step: Number of the step, for what is drawn when samples are read.
        infinite: Whether the images are made infinite after the hooks.
    """
    with torch.enable_grad():
        batch = prepared_batch(trainer, task, privacy.loader.batch_of(samples, step))
        if infinite:
            images = images_of(batch)
            batch = map_tensors(batch, lambda part: torch.full_like(images, math.inf) if part is images else part)
        with trainer.precision_plugin.train_step_context():
            loss = loss_of(task.training_step(batch, 0))
        task.backward(loss / trainer.accumulate_grad_batches)
        privacy.on_after_backward(trainer, task)
    return privacy.sums.pop()


@contextmanager
def _other_key(privacy: DifferentialPrivacy, number: int) -> Iterator[None]:
    """Draw by another secret key for a while: one that follows from the key and a number."""
    with overridden(privacy.random, "key", hashlib.sha256(privacy.random.key + f"audit {number}".encode()).digest()):
        yield


def _silent(*args: Any, **kwargs: Any) -> None:
    """Take the place of `log`, for no results are being collected yet."""


def _precision(trainer: Trainer) -> float:
    """Return how much a batch of another size may change the gradient of a sample by rounding, in parts of itself."""
    if trainer.precision_plugin.precision == "bf16-mixed":
        return 2.0**-8
    return 2.0**-11 if trainer.strategy.root_device.type == "cuda" else 2.0**-18  # TF32; float32
