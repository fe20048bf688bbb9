"""Loaders of labelled images: for evaluation, and for training that can go on in the middle of an epoch."""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from knlightning.data.datasets import LabelledImages
from knlightning.data.samplers import Sampling, TrainSampler
from knlightning.protocols import has_batch_norm


def drops_last(
    drop_last: bool | None, sampling: Sampling, samples: int, batch_size: int, trainer: Trainer | None
) -> bool:
    """Say whether the last training batch of an epoch is left out if it is not full.

    Args:
        drop_last: What is asked for; None for what `sampling` says, except that a single image is left out if the
            network has batch normalization.
        sampling: How the dataset is sampled.
        samples: Number of training images for each process.
        batch_size: Number of images in a batch.
        trainer: Trainer of the network; None if there is none.
    """
    if drop_last is not None:
        return drop_last
    single = samples > batch_size > 1 == samples % batch_size
    network = trainer.lightning_module if single and trainer is not None else None
    return sampling.drop_last or (network is not None and has_batch_norm(network))


def _reported(dataset: Any, batches: Iterator[Any]) -> Iterator[Any]:
    """Leave out batches of which nothing could be read, and let the dataset report when the iteration ends."""
    if not isinstance(dataset, LabelledImages):
        yield from batches
        return
    try:
        yield from (batch for batch in batches if len(batch[1]))
    finally:  # a limit on the number of batches ends an iteration too
        dataset.report()


class EvalLoader(DataLoader[Any]):
    """DataLoader that leaves out empty batches, and lets a dataset of `LabelledImages` report after each iteration.

    Arguments are those of `torch.utils.data.DataLoader`.
    """

    # torch promises one of its private iterators here; Lightning and all others need but an iterator.
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches."""
        yield from _reported(self.dataset, super().__iter__())


class ResumableLoader(DataLoader[Any]):
    """DataLoader over a `TrainSampler` whose position can be stored and restored.

    Lightning stores `state_dict` of a training loader in every checkpoint and hands it back when a run resumes in
    the middle of an epoch. The next batches are then those the interrupted run would have seen, with any number of
    workers. The position counts batches that were yielded, not those that workers have read in advance. Like
    `EvalLoader`, it lets the dataset report after each iteration.

    Arguments are those of `torch.utils.data.DataLoader`.
    """

    # Class attributes instead of an __init__, so that Lightning can build the loader again from its arguments.
    _epoch = 0  # epoch of the last iteration, and how many batches of it were yielded
    _batches = 0
    _restored: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override] # see EvalLoader
        """Yield the batches of the sampler's epoch; after a restore, those that remain of it.

        A generator, so that nothing is drawn from the sampler before the first batch is asked for: Lightning makes
        the first iterator before it tells the sampler the epoch.

        Raises:
            ValueError: If an epoch is to be continued with other batches than it was begun with.
        """
        yield from _reported(self.dataset, self._remaining())

    def _remaining(self) -> Iterator[Any]:
        sampler = self.sampler
        if isinstance(sampler, TrainSampler):  # not so with Trainer(overfit_batches=...): nothing to resume there
            restored, self._restored = self._restored, None
            self._epoch, self._batches = sampler.epoch, 0
            if restored is not None and restored["epoch"] == sampler.epoch:
                self._check(sampler, restored)
                self._batches = restored["batches"]
            sampler.start = self._batches * (self.batch_size or 1)
        for batch in super().__iter__():
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the position: epoch, number of batches yielded, and what the batches depend on."""
        sampler = self.sampler
        if not isinstance(sampler, TrainSampler):
            return {}
        if self._restored is not None:
            return dict(self._restored)
        batches = self._batches if self._epoch == sampler.epoch else 0
        return {"epoch": sampler.epoch, "batches": batches} | self._determinants(sampler)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from a position.

        Args:
            state_dict: What `state_dict` returned. If the sampler is then set to another epoch, the stored epoch was
                complete, and the next one begins at its first batch.
        """
        if state_dict and isinstance(self.sampler, TrainSampler):
            self._restored = dict(state_dict)
            self.sampler.epoch = state_dict["epoch"]

    def _determinants(self, sampler: TrainSampler) -> dict[str, int]:
        """Return what fixes the batches of an epoch."""
        return {
            "seed": sampler.seed,
            "samples": sampler.samples,
            "batch_size": self.batch_size or 1,
            "ranks": sampler.num_replicas,
            "repeats": sampler.repeats,
        }

    def _check(self, sampler: TrainSampler, restored: dict[str, int]) -> None:
        now = self._determinants(sampler)
        changed = [f"{key}={restored[key]} (now {now[key]})" for key in now if restored[key] != now[key]]
        if changed:
            raise ValueError(
                f"The checkpoint was written after {restored['batches']} batches of epoch {restored['epoch']}, with "
                f"{', '.join(changed)}. Other batches would show some images of that epoch twice. "
                "Resume with the same values, or from a checkpoint written at the end of an epoch."
            )
