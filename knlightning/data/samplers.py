"""Which images a rank sees, in which order: functions of (seed, epoch, rank) and of nothing else.

All classes are `DistributedSampler`s so that Lightning leaves them in place on several devices, where it would
otherwise put its own sampler around them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler


def _sized(samples: int) -> Dataset[Any]:
    """Return what `DistributedSampler` asks of a dataset: its length."""
    return cast(Dataset[Any], range(samples))


class TrainSampler(DistributedSampler[Any]):
    """Shuffles the training images anew each epoch and deals them out to the ranks.

    Every rank gets the same number of images. If the number of images is no multiple of the number of ranks, the
    last few of the epoch's permutation (fewer than there are ranks) are left out; other images each epoch.

    With repeated augmentation every image of the permutation comes `repeats` times in a row, and so to as many ranks
    as there are, each time to be varied anew. An epoch stays as long as it was, and shows only its first images.

    Source: repeated augmentation is E. Hoffer et al., Augment your batch, CVPR 2020, dealt out as by the `RASampler`
    of torchvision's reference training.

    Args:
        samples: Number of training images.
        seed: Base seed of the run, at least 0.
        ranks: Number of processes that train together.
        rank: Number of this process, 0 to `ranks - 1`.
        current_epoch: Asked for the number of the epoch, whatever `set_epoch` is told.
        repeats: How many times an image is shown in an epoch that shows it, at least 1.

    Attributes:
        epoch: Number of the epoch, as of the last call of `set_epoch`.
        start: How many of this rank's images to skip: where an interrupted epoch goes on.

    Raises:
        ValueError: There are fewer images than ranks.
    """

    def __init__(
        self,
        samples: int,
        seed: int,
        ranks: int = 1,
        rank: int = 0,
        current_epoch: Callable[[], int] | None = None,
        repeats: int = 1,
    ) -> None:
        if samples < ranks:
            raise ValueError(f"{samples} training images cannot be dealt out to {ranks} processes.")
        super().__init__(_sized(samples), num_replicas=ranks, rank=rank, seed=seed, drop_last=True)
        self.samples = samples
        self.current_epoch = current_epoch
        self.repeats = repeats
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order is drawn next.

        Args:
            epoch: Number of the epoch, from 0; passed over if `current_epoch` was given.
        """
        super().set_epoch(epoch if self.current_epoch is None else self.current_epoch())

    def __iter__(self) -> Iterator[Any]:
        return (index for index, _ in self._dealt())

    def _dealt(self) -> Iterator[tuple[int, int]]:
        """Yield what this rank gets: the number of an image, and how many times it was shown before in the epoch."""
        # the parent seeds with seed + epoch: epoch 1 of seed 0 would be epoch 0 of seed 1
        mixed = int(np.random.SeedSequence([self.seed, self.epoch]).generate_state(1)[0])
        order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(mixed))
        places = torch.arange(self.rank, self.total_size, self.num_replicas)[self.start :]
        return zip(order[places // self.repeats].tolist(), (places % self.repeats).tolist(), strict=True)


class Draw(NamedTuple):
    """One showing of a training image: all that its random numbers depend on.

    Attributes:
        seed: Base seed of the run.
        epoch: Number of the epoch.
        image: Number of the image.
        repetition: How many times the image was shown before in this epoch.
    """

    seed: int
    epoch: int
    image: int
    repetition: int

    @contextmanager
    def random(self) -> Iterator[None]:
        """Make what torch draws on the CPU in the block a function of this draw, and put its generator back after it.

        So random numbers depend neither on the process that varies an image nor on what it did before.
        """
        with torch.random.fork_rng(devices=[]):
            # the generator of the CPU alone: torch.manual_seed would seed that of a GPU too, which is not put back
            seed = np.random.SeedSequence(list(self)).generate_state(1, np.uint64)[0]
            torch.default_generator.manual_seed(int(seed))
            yield


class DrawSampler(TrainSampler):
    """TrainSampler of a dataset that varies the images itself, in whatever process: yields a `Draw` for each image.

    Arguments are those of `TrainSampler`.
    """

    def __iter__(self) -> Iterator[Any]:
        return (Draw(self.seed, self.epoch, *shown) for shown in self._dealt())


class EvalSampler(DistributedSampler[Any]):
    """Deals the images out to the ranks in order, each image exactly once, without padding.

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
