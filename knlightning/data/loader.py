"""Loaders of labelled images: for evaluation, and for training that can go on in the middle of an epoch."""

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed import get_world_size
from torch.utils.data import DataLoader

from knlightning.data.samplers import Sampling, TrainSampler
from knlightning.internals.torch import WORKER_HINT, worker_failure, worker_message, workers_of
from knlightning.protocols import has_batch_norm

READ_TIMEOUT = 600
"""Seconds after which processes that read files and have given no batch are taken for dead."""
MAX_WORKERS = 16
"""Most processes that read files for a device, unless the user says otherwise."""
LOST = (ConnectionError, EOFError)
"""What is raised if a process dies while it hands over a batch."""


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


def num_readers(devices: int) -> int:
    """Choose how many processes read files for a device.

    Args:
        devices: Number of devices.
    """
    # a container or a batch system may grant fewer processors than the machine has
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, processors // devices))


def read(batches: Iterable[Any]) -> Iterator[Any]:
    """Pass on the batches of a DataLoader, and say plainly what happened to the processes that read for it.

    Args:
        batches: A DataLoader, or an iterator of one.

    Raises:
        ValueError: If a process has raised it; with its message, and without its traceback. OSError likewise.
        OSError: If such a process has died, or has given no batch for `READ_TIMEOUT` seconds.
    """
    iterator = iter(batches)
    workers = workers_of(iterator)
    exceeded = threading.Event()
    while True:
        try:
            with _time_limit(workers, exceeded):
                batch = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            try:
                plain = _explained(error, workers, exceeded.is_set())
            except RuntimeError as signalled:  # the signal that a process has died comes at any moment
                plain = _explained(signalled, workers, exceeded.is_set())
            if plain is None:
                raise
            raise plain from error
        yield batch


def _explained(error: Exception, workers: list[Any], late: bool) -> Exception | None:
    """Return the error to raise in place of one that a DataLoader raises; None for that error itself."""
    failure = worker_failure(error)
    if failure or (workers and isinstance(error, LOST)):
        if late:
            failure = f"The processes that read images have given no batch for {READ_TIMEOUT} seconds."
        return OSError(f"{failure or 'A process that reads images has died.'} {WORKER_HINT}")
    if isinstance(error, (ValueError, OSError)) and (message := worker_message(error)):
        return type(error)(message)
    return None


@contextmanager
def _time_limit(workers: list[Any], exceeded: threading.Event) -> Iterator[None]:
    """Kill processes if the block takes longer than `READ_TIMEOUT`: a stopped one would be waited for without end.

    Args:
        workers: The processes.
        exceeded: Is set if they were killed.
    """

    def kill() -> None:
        exceeded.set()
        for worker in workers:
            worker.kill()

    # not the timeout of DataLoader, which does not hold while a tensor is handed over
    timer = threading.Timer(READ_TIMEOUT, kill)
    timer.daemon = True
    if workers:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _reported(dataset: Any, batches: Iterator[Any], at_least_one: bool = False) -> Iterator[Any]:
    """Leave out batches of which nothing could be read, and let the dataset report when the iteration ends.

    Args:
        dataset: With a method `report`, or any other.
        batches: Its batches.
        at_least_one: Whether an empty batch comes if there is no other.
    """
    if not hasattr(dataset, "report"):
        yield from batches
        return
    try:
        for batch in batches:
            if len(batch[1]):
                at_least_one = False
                yield batch
        if at_least_one:
            yield dataset.empty_batch()
    finally:  # a limit on the number of batches ends an iteration too
        dataset.report()


class EvalLoader(DataLoader[Any]):
    """DataLoader that leaves out empty batches, and lets a dataset that can do so report after each iteration.

    Where several processes evaluate together, one without images gets an empty batch: Lightning would otherwise leave
    out all that the processes have to do together.

    Arguments are those of `torch.utils.data.DataLoader`.
    """

    # torch promises one of its private iterators here; Lightning and all others need but an iterator.
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches."""
        yield from _reported(self.dataset, read(super().__iter__()), at_least_one=_several_processes())

    def __len__(self) -> int:
        return max(super().__len__(), int(_several_processes()))


def _several_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized() and get_world_size() > 1


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
        for batch in read(super().__iter__()):
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
            # earlier checkpoints do not say all of it
            self._restored = {"balanced": 0, "mixed_shards": 0, "sizes_of_shards": 0} | state_dict
            self.sampler.epoch = state_dict["epoch"]

    def _determinants(self, sampler: TrainSampler) -> dict[str, int]:
        """Return what fixes the batches of an epoch."""
        return {
            "seed": sampler.seed,
            "samples": sampler.samples,
            "batch_size": self.batch_size or 1,
            "ranks": sampler.num_replicas,
            "repeats": sampler.repeats,
            "balanced": int(sampler.weights is not None),
            "mixed_shards": sampler.mixed_shards,
            "sizes_of_shards": sampler.sizes_of_shards,
        }

    def _check(self, sampler: TrainSampler, restored: dict[str, int]) -> None:
        now = self._determinants(sampler)
        changed = [key for key in now if restored[key] != now[key]]
        if not changed:
            return
        told = ", ".join(f"{key}={restored[key]} (now {now[key]})" for key in changed)
        same_steps = restored["ranks"] * restored["batch_size"] == now["ranks"] * now["batch_size"]
        if same_steps and {*changed} == {"ranks", "batch_size"}:
            rank_zero_info(
                f"Epoch {restored['epoch']} goes on after {restored['batches']} batches with {told}: the same images in"
                " each step. Other random numbers of the network, other rounding of sums, and, of batch normalization,"
                " statistics of other parts of a batch."
            )
            return
        raise ValueError(
            f"The checkpoint was written after {restored['batches']} batches of epoch {restored['epoch']}, with {told}."
            " Other batches would show some images of that epoch twice. Resume with the same values, with another"
            " number of devices of as many images together (ranks times batch_size), or from a checkpoint written at"
            " the end of an epoch."
        )
