"""Which images a rank sees, in which order: functions of (seed, epoch, rank) and of nothing else.

The samplers are `DistributedSampler`s so that Lightning leaves them in place on several devices, where it would
otherwise put its own sampler around them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler

from knlightning.checks import check_number


@dataclass(frozen=True)
class Sampling:
    """Which splits of a dataset a datamodule uses, and how it samples them.

    How an image is augmented is not said here: training uses the `train_sampler` of the dataset that `load` returns.

    Attributes:
        train: Split to train on.
        val: Split to validate on, if `val_split` is 0.
        test: Split to test on.
        drop_last: Whether an epoch's last training batch is left out if it is not full.
        repeats: How many times an epoch shows each training image that it shows, augmented anew each time; see
            `TrainSampler`.
    """

    train: str = "train"
    val: str = "val"
    test: str = "test"
    drop_last: bool = False
    repeats: int = 1


def generator_of(*numbers: int) -> torch.Generator:
    """Make a generator on the CPU whose seed is a function of numbers of at least 0."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def _sized(samples: int) -> Dataset[Any]:
    """Return what `DistributedSampler` asks of a dataset: its length."""
    return cast(Dataset[Any], range(samples))


class TrainSampler(DistributedSampler[Any]):
    """Shuffles the training images anew each epoch and distributes them over the ranks.

    Every rank gets the same number of images. If the number of images is no multiple of the number of ranks, the
    last few of the epoch's permutation (fewer than there are ranks) are left out; other images each epoch.

    With repeated augmentation every image of the permutation comes `repeats` times in a row, and is augmented anew each
    time. With several ranks the repetitions go to different ranks. An epoch has as many samples as without it, so that
    it shows only the first images of its permutation.

    Source: repeated augmentation is E. Hoffer et al., Augment your batch, CVPR 2020, distributed as by the
    `RASampler` of torchvision's reference training.

    Args:
        samples: Number of training images.
        seed: Base seed of the run, at least 0.
        ranks: Number of processes that train together.
        rank: Number of this process, 0 to `ranks - 1`.
        current_epoch: Returns the number of the epoch; then the argument of `set_epoch` is ignored.
        repeats: How many times an epoch shows an image that it shows, at least 1.
        strata: Class of each image, int64 `(samples,)`, for an epoch that draws its images independently, those of each
            class equally often on average; None for a permutation of all images.

    Attributes:
        epoch: Number of the epoch, as of the last call of `set_epoch`.
        start: How many of this rank's images to skip: where an interrupted epoch goes on.
        mixed_shards: See `ShardSampler`; 0 where images do not lie in shards. The same is true of sizes_of_shards.
        sizes_of_shards: A number that differs if they do.

    Raises:
        ArgumentError: If there are fewer images than ranks.
    """

    def __init__(
        self,
        samples: int,
        seed: int,
        ranks: int = 1,
        rank: int = 0,
        current_epoch: Callable[[], int] | None = None,
        repeats: int = 1,
        strata: torch.Tensor | None = None,
    ) -> None:
        check_number("samples", samples, at_least=ranks, integer=True, hint="Each process needs a training image.")
        super().__init__(_sized(samples), num_replicas=ranks, rank=rank, seed=seed, drop_last=True)
        self.samples = samples
        self.current_epoch = current_epoch
        self.repeats = repeats
        self.weights = None if strata is None else 1 / strata.bincount()[strata].double()
        self.start = 0
        self.mixed_shards, self.sizes_of_shards = 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order is drawn next.

        Args:
            epoch: Number of the epoch, from 0; ignored if `current_epoch` was given.
        """
        super().set_epoch(epoch if self.current_epoch is None else self.current_epoch())

    def __iter__(self) -> Iterator[Any]:
        return (index for index, _ in self.indices_and_repetitions())

    def order(self, generator: torch.Generator) -> torch.Tensor:
        """Return the images of an epoch in their order.

        Args:
            generator: Gives the random numbers of the epoch.
        """
        if self.weights is None:
            return torch.randperm(self.samples, generator=generator)
        return torch.multinomial(self.weights, self.samples, replacement=True, generator=generator)

    def indices_and_repetitions(self) -> Iterator[tuple[int, int]]:
        """Yield for this rank the index of each image, and how many times the epoch has shown the image before."""
        # the parent seeds with seed + epoch: epoch 1 of seed 0 would be epoch 0 of seed 1
        order = self.order(generator_of(self.seed, self.epoch))
        places = torch.arange(self.rank, self.total_size, self.num_replicas)[self.start :]
        return zip(order[places // self.repeats].tolist(), (places % self.repeats).tolist(), strict=True)


class SeededIndex(NamedTuple):
    """Index of a training image, with all that the random numbers of its augmentation depend on.

    Attributes:
        seed: Base seed of the run.
        epoch: Number of the epoch.
        image: Index of the image.
        repetition: How many times the epoch has shown the image before.
    """

    seed: int
    epoch: int
    image: int
    repetition: int

    @property
    def replaceable(self) -> bool:
        """Whether another image may take the place of one that cannot be read."""
        return True

    @contextmanager
    def random_numbers(self) -> Iterator[None]:
        """Seed torch's global generator on the CPU by this index, for the time of the block.

        So the random numbers depend neither on the process that augments an image nor on what it did before.
        """
        with torch.random.fork_rng(devices=[]):
            # the generator of the CPU alone: torch.manual_seed would seed that of a GPU too, which is not restored
            seed = np.random.SeedSequence(list(self)).generate_state(1, np.uint64)[0]
            torch.default_generator.manual_seed(int(seed))
            yield


class ExactIndex(SeededIndex):
    """SeededIndex of private training, where no other image may take the place, since none may count twice."""

    @property
    def replaceable(self) -> bool:
        return False


class SeededSampler(TrainSampler):
    """TrainSampler of a dataset that augments images itself, in whatever process: yields `SeededIndex`es.

    Arguments are those of `TrainSampler`.
    """

    def __iter__(self) -> Iterator[Any]:
        return (SeededIndex(self.seed, self.epoch, *shown) for shown in self.indices_and_repetitions())


class EvalSampler(DistributedSampler[Any]):
    """Distributes the images over the ranks in order, each image exactly once, without padding.

    Args:
        samples: Number of images.
        ranks: Number of processes that evaluate together.
        rank: Number of this process, 0 to `ranks - 1`.
    """

    def __init__(self, samples: int, ranks: int, rank: int) -> None:
        super().__init__(_sized(samples), num_replicas=ranks, rank=rank, shuffle=False)
        self._indices = range(rank, samples, ranks)

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)
