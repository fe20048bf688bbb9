"""Training batches for DP-SGD: a Poisson sample for each step, cut into micro-batches of a size that fits."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from knlightning.data.loader import read
from knlightning.data.samplers import ExactIndex, SeededIndex, SeededSampler
from knlightning.privacy.batches import map_tensors
from knlightning.privacy.randomness import SecretRandom

PLAIN_SAMPLERS = (DistributedSampler, RandomSampler, SequentialSampler)


class PrivateLoader:
    """Batches of a run of DP-SGD: every step takes each sample with the same probability, independently of all else.

    A step comes as `micro_batches` batches for each rank, of nearly equal sizes, some of them perhaps empty. Samples
    that are varied (augmentation in the dataset) are varied by the number of the step.

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
    ) -> None:
        check_loader(loader)
        self.num_samples, self.batch_size = len(loader.dataset), batch_size
        self.steps_per_epoch, self.micro_batches, self.views = steps_per_epoch, micro_batches, views
        self.random, self.world_size, self.rank = random, world_size, rank
        self.next_step, self.poisson_sampling = next_step, poisson_sampling
        self._seeded = loader.sampler if isinstance(loader.sampler, SeededSampler) else None
        self._batches_given = 0
        self._restored = 0
        self._batches = _Pieces(loader.dataset, loader.collate_fn, self._any_index())
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
            generator=torch.Generator().manual_seed(0),  # for the workers' seeds; the global one stays as it is
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
        for batch in read(self._loader):
            self._batches_given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the position in the epoch."""
        steps, rest = divmod(self._restored or self._batches_given, self.micro_batches)
        return {"num_steps": steps, "micro_batch": rest}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from a position; steps may have another number of micro-batches than they had.

        Earlier checkpoints call it `steps` and `part`.
        """
        steps = state_dict.get("num_steps", state_dict.get("steps", 0))
        rest = state_dict.get("micro_batch", state_dict.get("part", 0))
        self._restored = steps * self.micro_batches + (rest if rest < self.micro_batches else 1)

    def batch_of(self, samples: Iterable[int]) -> Any:
        """Read a batch of some samples by their numbers, as the training sees them in its first step."""
        return self._batches[[self._index(0, sample, 0) for sample in samples]]

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

    def _batches_of_epoch(self) -> Iterator[list[Any]]:
        """Yield for each batch of this rank the samples it takes."""
        first = self.next_step()
        for step in range(first, first + self.steps_per_epoch - self._batches_given // self.micro_batches):
            drawn = self.draw(step)
            for batch in range(self.micro_batches):
                start, stride = self.rank * self.micro_batches + batch, self.world_size * self.micro_batches
                own = drawn[start::stride].tolist()
                yield [self._index(step, sample, view) for sample in own for view in range(self.views)]

    def _any_index(self) -> Any:
        return 0 if self._seeded is None else SeededIndex(self._seeded.seed, 0, 0, 0)

    def _index(self, step: int, sample: int, view: int) -> Any:
        return sample if self._seeded is None else ExactIndex(self._seeded.seed, step, sample, view)


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
    if not isinstance(loader.sampler, PLAIN_SAMPLERS):
        raise ValueError(
            "private training draws the samples of each step itself, and the training loader has a sampler of its own,"
            f" {type(loader.sampler).__name__}: leave it out, or take what it selects into a dataset of its own"
        )


class _Iterable:
    """Gives a new iterator of a function each time: a sampler for `DataLoader`."""

    def __init__(self, start: Callable[[], Iterator[list[Any]]]) -> None:
        self.start = start

    def __iter__(self) -> Iterator[list[Any]]:
        return self.start()


class _Pieces(Dataset[Any]):
    """Batches by the lists of their samples, empty ones too. A sample for which the dataset gives None is left out.

    Args:
        dataset: The samples.
        collate: Makes a batch of them.
        any_index: Index of a sample, which an empty batch takes its shape from.
    """

    def __init__(self, dataset: Dataset[Any], collate: Callable[[Any], Any], any_index: Any) -> None:
        self.dataset, self.collate, self.any_index = dataset, collate, any_index

    def __getitem__(self, indices: list[Any]) -> Any:
        several = getattr(self.dataset, "__getitems__", None)
        if several and indices:
            return self.collate(several(indices))
        samples = [self.dataset[index] for index in indices]
        damaged = {_sample_of(index) for index, sample in zip(indices, samples, strict=True) if sample is None}
        # in all of its views, also if some could be read
        kept = [sample for index, sample in zip(indices, samples, strict=True) if _sample_of(index) not in damaged]
        if kept:
            return self.collate(kept)
        batch = self.collate(several([self.any_index]) if several else [self._any_sample()])
        return map_tensors(batch, lambda part: part[:0])

    def _any_sample(self) -> Any:
        for index in chain([self.any_index], range(len(self.dataset))):  # type: ignore[arg-type] # check_loader
            if (sample := self.dataset[index]) is not None:
                return sample
        raise ValueError("none of the training samples can be read")


def _sample_of(index: Any) -> Any:
    return index.image if isinstance(index, SeededIndex) else index


def _identity(batch: Any) -> Any:
    return batch
