"""Training batches for DP-SGD: a Poisson sample for each step, cut into micro-batches of a size that fits."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, default_collate
from torch.utils.data.distributed import DistributedSampler

from knlightning.data.loader import read
from knlightning.data.samplers import ExactIndex, SeededIndex, SeededSampler
from knlightning.privacy.batches import images_of, join_batches, map_tensors
from knlightning.privacy.global_random import seed_generators, seeded_generators
from knlightning.privacy.plan import (
    check_sampling,
    count_cut_micro_batches,
    count_micro_batches,
    count_steps_per_epoch,
)
from knlightning.privacy.randomness import SecretRandom
from knlightning.protocols import is_batch_independent

CPU = torch.device("cpu")
PLAIN_SAMPLERS = (DistributedSampler, RandomSampler, SequentialSampler)


class PrivateLoader:
    """Batches of a run of DP-SGD: every step takes each sample with the same probability, independently of all else.

    A step comes as `micro_batches` batches for each rank, of nearly equal sizes, some of them perhaps empty. Each
    sample is read and collated by itself, and the results are joined, so that none changes another. Only where the
    dataset and its collate function are marked by `knlightning.protocols.batch_independent`, batches are read as a
    whole. Random numbers of the dataset (augmentation) come from the secret key, by the numbers of the step and the
    sample, whatever other samples the step has.

    Not a DataLoader, so that Lightning leaves it as it is. It has one, with the dataset, the workers and the collate
    function of the loader it takes the place of.

    Args:
        loader: The training loader without privacy, over a map-style dataset.
        batch_size: Number of samples in a step on all ranks, on average.
        steps_per_epoch: Number of steps in an epoch.
        micro_batches: Number of batches in a step, for each rank.
        views: How many times a sample comes in a row, to be varied each time anew.
        random: Where the samples are drawn from; the same on all ranks.
        world_size: Number of processes that train together.
        rank: Number of this one.
        next_step: Returns the number of the step that comes next in the run.
        poisson_sampling: False for batches of equal size that divide a permutation of the samples, renewed each epoch.
        max_samples: Number of samples at which a step is cut; None for none.

    Raises:
        ValueError: If the loader cannot be taken over.
    """

    def __init__(
        self,
        loader: Any,
        *,
        batch_size: int,
        steps_per_epoch: int,
        micro_batches: int,
        views: int,
        random: SecretRandom,
        world_size: int,
        rank: int,
        next_step: Callable[[], int],
        poisson_sampling: bool = True,
        max_samples: int | None = None,
    ) -> None:
        check_loader(loader)
        self.num_samples, self.batch_size = len(loader.dataset), batch_size
        self.steps_per_epoch, self.micro_batches, self.views = steps_per_epoch, micro_batches, views
        self.random, self.world_size, self.rank = random, world_size, rank
        self.next_step, self.poisson_sampling, self.max_samples = next_step, poisson_sampling, max_samples
        self._seeded = isinstance(loader.sampler, SeededSampler)
        self._batches_given = 0
        self._restored = 0
        any_index = SeededIndex(0, 0, 0, 0) if self._seeded else 0
        self._batches = _Pieces(loader.dataset, loader.collate_fn, any_index, views, random)
        self._loader = DataLoader(
            self._batches,
            batch_size=None,
            sampler=_Iterable(self._batches_of_epoch),
            num_workers=loader.num_workers,
            collate_fn=_identity,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            # for the workers' seeds; the global one stays as it is
            generator=torch.Generator().manual_seed(random.seed("workers", rank)),
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )

    @property
    def sampling_probability(self) -> float:
        """Probability of each sample to be in a step."""
        return self.batch_size / self.num_samples

    def __len__(self) -> int:
        return self.steps_per_epoch * self.micro_batches

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of an epoch, after a restore those that are left of it.

        Raises:
            ValueError: If the epoch was left in the middle of a step.
        """
        self._batches_given, self._restored = self._restored % len(self), 0
        if part := self._batches_given % self.micro_batches:
            raise ValueError(
                f"the checkpoint was written within a step, after {part} of its {self.micro_batches} micro-batches, and"
                " a private run can only go on between two steps: resume from another one"
            )
        try:
            for batch in read(self._loader):
                self._batches_given += 1
                yield batch
        finally:  # a limit on the number of batches ends an iteration too
            getattr(self._batches.dataset, "report", lambda: None)()

    def state_dict(self) -> dict[str, int]:
        """Return the position in the epoch."""
        steps, rest = divmod(self._restored or self._batches_given, self.micro_batches)
        return {"num_steps": steps, "micro_batch": rest}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from a position; steps may have another number of micro-batches than they had."""
        rest = state_dict["micro_batch"]
        self._restored = state_dict["num_steps"] * self.micro_batches + (rest if rest < self.micro_batches else 1)

    def batch_of(self, samples: Iterable[int], step: int = 0) -> Any:
        """Read a batch of some samples by their numbers, as the training sees them in a step."""
        return self._batches["trial", step, self._indices(step, samples)]

    def draw(self, step: int) -> torch.Tensor:
        """Draw the samples of a step.

        Args:
            step: Number of the step in the run.

        Returns:
            Numbers of the samples in random order, int64.
        """
        if self.poisson_sampling:
            return self.random.chosen(self.num_samples, self.sampling_probability, step)
        epoch, position = divmod(step, self.steps_per_epoch)
        permutation = self.random.permutation(self.num_samples, "shuffling", epoch)
        return permutation[position * self.batch_size : (position + 1) * self.batch_size]

    def _batches_of_epoch(self) -> Iterator[tuple[str, int, list[Any]]]:
        """Yield for each batch of this rank its name, the number of the step, and the samples it takes."""
        first = self.next_step()
        for step in range(first, first + self.steps_per_epoch - self._batches_given // self.micro_batches):
            drawn = self.draw(step)[: self.max_samples]
            for batch in range(self.micro_batches):
                start, stride = self.rank * self.micro_batches + batch, self.world_size * self.micro_batches
                yield f"batch {start}", step, self._indices(step, drawn[start::stride].tolist())

    def _indices(self, step: int, samples: Iterable[int]) -> list[Any]:
        """List what the dataset gets for each view of each sample."""
        views = range(self.views)
        if not self._seeded:
            return [sample for sample in samples for _ in views]
        # by the secret key: who knows how the samples are varied could tell by it how many there are before one
        seed = self.random.seed("augmentation", 0)
        return [ExactIndex(seed, step, sample, view) for sample in samples for view in views]


def private_loader(
    loader: Any,
    *,
    trainer: Trainer,
    random: SecretRandom,
    target_delta: float,
    physical_batch_size: int | None,
    max_physical_batch_size: int | None,
    views: int,
    poisson_sampling: bool,
) -> PrivateLoader:
    """Make the private loader of a run.

    Args:
        loader: The training loader without privacy.
        trainer: Of the run.
        random: Where the samples are drawn from; the same on all ranks.
        target_delta: Probability with which the guarantee may fail.
        physical_batch_size: Number of images at once on each device, on average; None for all of a step.
        max_physical_batch_size: The same at most; None for no bound.
        views: How many times a sample comes in a row.
        poisson_sampling: As in `PrivateLoader`.

    Raises:
        ValueError: If the loader cannot be taken over, or the step or delta does not fit the number of samples.
    """
    check_loader(loader)
    num_samples, world_size = len(loader.dataset), trainer.world_size
    micro_batches = trainer.accumulate_grad_batches
    batch_size = loader.batch_size * world_size * micro_batches
    check_sampling(num_samples, batch_size, target_delta)
    if physical_batch_size is not None:
        micro_batches = count_micro_batches(batch_size, views, physical_batch_size, world_size)
    max_samples = None
    if (most := max_physical_batch_size) is not None:
        micro_batches = count_cut_micro_batches(num_samples, batch_size, views, most, world_size, target_delta)
        max_samples = micro_batches * world_size * (most // views)
    return PrivateLoader(
        loader,
        batch_size=batch_size,
        steps_per_epoch=count_steps_per_epoch(num_samples, batch_size, poisson_sampling),
        micro_batches=micro_batches,
        views=views,
        random=random,
        world_size=world_size,
        rank=trainer.global_rank,
        next_step=lambda: trainer.global_step,
        poisson_sampling=poisson_sampling,
        max_samples=max_samples,
    )


def check_loader(loader: Any) -> None:
    """Check that a training loader can be taken over by `PrivateLoader`.

    Raises:
        ValueError: If it is no DataLoader with a length, or draws its samples in a way of its own.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "private training draws the samples of each step itself, and needs a torch.utils.data.DataLoader over a"
            f" dataset with __getitem__ and __len__ to take them from, got a {type(loader).__name__}"
        )
    if loader.batch_size is None:
        raise ValueError(
            "private training draws the samples of each step itself, of batch_size on average, and the training loader"
            " has a batch_sampler in place of a batch_size, or none of both: give it a batch_size"
        )
    if not isinstance(loader.sampler, PLAIN_SAMPLERS):
        raise ValueError(
            "private training draws the samples of each step itself, and the training loader has a sampler of its own,"
            f" {type(loader.sampler).__name__}: leave it out, or take what it selects into a dataset of its own"
        )


class _Iterable:
    """Gives a new iterator of a function each time: a sampler for `DataLoader`."""

    def __init__(self, start: Callable[[], Iterator[Any]]) -> None:
        self.start = start

    def __iter__(self) -> Iterator[Any]:
        return self.start()


class _Pieces(Dataset[Any]):
    """Batches by their name, their step, and the list of their samples; empty ones too.

    A sample for which the dataset gives None, such as a file that cannot be read, is left out.

    Args:
        dataset: The samples.
        collate: Makes a batch of them.
        any_index: Index of a sample, which an empty batch takes its shape from.
        views: Number of indices in a row that belong to one sample.
        random: Where the seed of a batch comes from.
    """

    def __init__(
        self, dataset: Dataset[Any], collate: Callable[[Any], Any], any_index: Any, views: int, random: SecretRandom
    ) -> None:
        self.dataset, self.collate, self.any_index, self.views, self.random = dataset, collate, any_index, views, random
        self.several: Callable[[list[Any]], Any] | None = getattr(dataset, "__getitems__", None)
        independent = collate is default_collate or is_batch_independent(collate, dataset)
        self.independent = independent and (self.several is None or is_batch_independent(self.several, dataset))

    def __getitem__(self, batch: tuple[str, int, list[Any]]) -> Any:
        name, step, indices = batch
        with seeded_generators(self.random.seed(name, step), CPU):
            if self.independent:
                return self._read(indices, step)
            starts = range(0, len(indices), self.views)
            parts = [self._read(indices[start : start + self.views], step) for start in starts]
            return join_batches([part for part in parts if len(images_of(part))] or [self._empty()])

    def _read(self, indices: list[Any], step: int) -> Any:
        if self.several and indices:
            if not self.independent:
                self._seed(indices[0], 0, step)
            batch = self.collate(self.several(indices))
        else:
            samples = [self._sample(index, place % self.views, step) for place, index in enumerate(indices)]
            damaged = {_sample_of(index) for index, sample in zip(indices, samples, strict=True) if sample is None}
            # in all of its views, also if some could be read
            kept = [sample for index, sample in zip(indices, samples, strict=True) if _sample_of(index) not in damaged]
            if not kept:
                return self._empty()
            batch = self.collate(kept)
        if (images := len(images_of(batch))) > len(indices):
            raise ValueError(
                f"the collate function made {images} images of {len(indices)} samples, and private training bounds what"
                " each image contributes: for several views of a sample, set views of DifferentialPrivacy"
            )
        return batch

    def _sample(self, index: Any, view: int, step: int) -> Any:
        self._seed(index, view, step)
        return self.dataset[index]

    def _seed(self, index: Any, view: int, step: int) -> None:
        """Make what is drawn for a sample independent of the others in its batch."""
        seed_generators(self.random.seed(f"sample {_sample_of(index)}, view {view}", step))

    def _empty(self) -> Any:
        samples = self.several([self.any_index] * self.views) if self.several else [self._any_sample()] * self.views
        return map_tensors(self.collate(samples), lambda part: part[:0])

    def _any_sample(self) -> Any:
        for index in chain([self.any_index], range(len(self.dataset))):  # type: ignore[arg-type] # check_loader
            if (sample := self.dataset[index]) is not None:
                return sample
        raise ValueError("none of the training samples can be read")


def _sample_of(index: Any) -> Any:
    return index.image if isinstance(index, SeededIndex) else index


def _identity(batch: Any) -> Any:
    return batch
