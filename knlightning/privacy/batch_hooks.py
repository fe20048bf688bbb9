"""The hooks that Lightning calls between the training loader and the training step, each sample by itself.

A hook that is given a whole batch may mix its samples, or shift and scale them by what they have in common. The bound
on what a sample changes would not hold then. In private training the hooks get batches of one sample, and what they
return is joined. Hooks that are marked by `knlightning.protocols.batch_independent` get whole batches, which is faster.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.hooks import DataHooks
from torch import Tensor

from knlightning.internals.lightning import overridden
from knlightning.internals.torch import version_of
from knlightning.privacy.batches import count_samples, images_of, join_batches, map_tensors, split_batch
from knlightning.privacy.global_random import seeded_generators
from knlightning.protocols import is_batch_independent

HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
"""In the order in which Lightning calls them."""


@contextmanager
def hooks_by_sample(
    trainer: Trainer,
    task: LightningModule,
    views: int,
    seed: Callable[[str], int],
    before_step: Callable[[], None],
) -> Iterator[None]:
    """Call the hooks of training batches for each sample by itself, and hold the batch as it is until the step.

    Args:
        trainer: In `fit`; its batches of validation are left alone.
        task: The task that is trained.
        views: Number of rows in a batch that belong to one sample.
        seed: Makes the secret seed of a hook's random numbers, by the hook's name.
        before_step: Is called last, before each training step.
    """
    with ExitStack() as undo:
        for owner in (task, trainer.datamodule):  # type: ignore[attr-defined] # set by Lightning
            for name in HOOKS:
                original = getattr(owner, name, None)
                if original is not None and getattr(original, "__func__", original) is not getattr(DataHooks, name):
                    whole = is_batch_independent(original, owner)
                    hook = partial(_by_sample, trainer, original, name, views, seed, whole)
                    undo.enter_context(overridden(owner, name, hook))
        given: list[tuple[Tensor, int]] = []
        strategy = trainer.strategy
        to_device = partial(_noting, trainer, strategy.batch_to_device, given)
        undo.enter_context(overridden(strategy, "batch_to_device", to_device))
        step = partial(_unchanged, strategy.training_step, given, before_step)
        undo.enter_context(overridden(strategy, "training_step", step))
        yield


def _by_sample(
    trainer: Trainer,
    original: Callable[..., Any],
    name: str,
    views: int,
    seed: Callable[[str], int],
    whole: bool,
    batch: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not trainer.training:
        return original(batch, *args, **kwargs)
    count = count_samples(batch, views)
    with seeded_generators(seed(name), trainer.strategy.root_device):
        if whole:
            result = original(batch, *args, **kwargs)
        elif count == 0:
            result = batch  # no training step gets it
        else:
            result = join_batches([original(part, *args, **kwargs) for part in split_batch(batch, count)])
    if len(images_of(result)) != count * views:
        raise ValueError(
            f"{name} made {len(images_of(result))} images of {count * views}, and private training bounds what each"
            " image contributes: it must return as many. For several views of a sample, set views of"
            " DifferentialPrivacy"
        )
    return result


def _noting(trainer: Trainer, original: Callable[..., Any], given: list[Any], *args: Any, **kwargs: Any) -> Any:
    """Note the tensors of a training batch as they arrive on the device."""
    batch = original(*args, **kwargs)
    if trainer.training:
        given[:] = _versions(batch)
    return batch


def _unchanged(
    original: Callable[..., Any], given: list[Any], before_step: Callable[[], None], *args: Any, **kwargs: Any
) -> Any:
    """Check that nothing has changed the batch since, then take the training step."""
    now = _versions((args, kwargs))
    same = len(now) == len(given) and all(a is b and old == new for (a, old), (b, new) in zip(given, now, strict=True))
    given.clear()
    if not same:
        raise RuntimeError(
            "privacy: the training batch was changed after its transfer, as by on_train_batch_start of a callback or of"
            " the task, which sees all samples at once: change it in on_after_batch_transfer, which gets each sample by"
            " itself"
        )
    before_step()
    return original(*args, **kwargs)


def _versions(batch: Any) -> list[tuple[Tensor, int]]:
    seen: list[tuple[Tensor, int]] = []

    def note(part: Tensor) -> Tensor:
        seen.append((part, version_of(part)))
        return part

    map_tensors(batch, note)
    return seen
