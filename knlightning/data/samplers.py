"""Which images a rank sees, in which order: functions of (seed, epoch, rank) and of nothing else.

Both classes are `DistributedSampler`s so that Lightning leaves them in place on several devices, where it would
otherwise put its own sampler around them.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

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

    Args:
        samples: Number of training images.
        seed: Base seed of the run, at least 0.
        ranks: Number of processes that train together.
        rank: Number of this process, 0 to `ranks - 1`.
        current_epoch: Asked for the number of the epoch, whatever `set_epoch` is told.

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
    ) -> None:
        if samples < ranks:
            raise ValueError(f"{samples} training images cannot be dealt out to {ranks} processes.")
        super().__init__(_sized(samples), num_replicas=ranks, rank=rank, seed=seed, drop_last=True)
        self.samples = samples
        self.current_epoch = current_epoch
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order is drawn next.

        Args:
            epoch: Number of the epoch, from 0; passed over if `current_epoch` was given.
        """
        super().set_epoch(epoch if self.current_epoch is None else self.current_epoch())

    def __iter__(self) -> Iterator[int]:
        # the parent seeds with seed + epoch: epoch 1 of seed 0 would be epoch 0 of seed 1
        mixed = int(np.random.SeedSequence([self.seed, self.epoch]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(mixed)
        order = torch.randperm(self.samples, generator=generator)[: self.total_size]
        return iter(order[self.rank :: self.num_replicas][self.start :].tolist())


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
