"""Training batches for DP-SGD: a Poisson sample for each step, cut into pieces of a size that fits."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from knlightning.data.samplers import SeededIndex, SeededSampler
from knlightning.privacy.randomness import SecretRandom

PLAIN_SAMPLERS = (DistributedSampler, RandomSampler, SequentialSampler)


class PrivateLoader:
    """Batches of a run of DP-SGD: every step takes each sample with probability `rate`, independently of all else.

    A step comes as `pieces` batches for each rank, of nearly equal sizes, some of them perhaps empty. What varies the
    samples (augmentation in the dataset) gets random numbers of the step's own. An epoch is `steps` steps.

    Not a DataLoader, so that Lightning leaves it as it is; it has one, with the dataset, the workers and the collate
    function of the loader it takes the place of.

    Args:
        loader: the training loader without privacy, over a map-style dataset.
        rate: probability of a sample to be in a step.
        steps: steps in an epoch.
        pieces: batches in a step, for each rank.
        views: how many times a sample comes in a row, to be varied each time anew.
        random: where the samples are drawn from; the same on all ranks.
        ranks: number of processes that train together.
        rank: number of this one.
        next_step: asked for the number of the step that comes next in the run.
        poisson: False for batches of equal size that divide a permutation of the samples, renewed each epoch.

    Raises:
        ValueError: if the loader cannot be taken over.
    """

    def __init__(
        self,
        loader: Any,
        rate: float,
        steps: int,
        pieces: int,
        views: int,
        random: SecretRandom,
        ranks: int,
        rank: int,
        next_step: Callable[[], int],
        poisson: bool = True,
    ) -> None:
        check_loader(loader)
        self.samples = len(loader.dataset)
        self.rate, self.steps, self.pieces, self.views = rate, steps, pieces, views
        self.random, self.ranks, self.rank, self.poisson = random, ranks, rank, poisson
        self.next_step = next_step
        self._seeded = loader.sampler if isinstance(loader.sampler, SeededSampler) else None
        self._handed_out = 0
        self._restored = 0
        self.loader = DataLoader(
            _Pieces(loader.dataset, loader.collate_fn, self._index(0, 0, 0)),
            batch_size=None,
            sampler=_Iterating(self._cells),
            num_workers=loader.num_workers,
            collate_fn=_as_it_is,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=torch.Generator().manual_seed(0),  # for the workers' seeds; the global one stays as it is
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )

    def __len__(self) -> int:
        return self.steps * self.pieces

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of an epoch, after a restore those that are left of it.

        Raises:
            ValueError: if the epoch was left in the middle of a step.
        """
        self._handed_out, self._restored = self._restored % len(self), 0
        if self._handed_out % self.pieces:
            raise ValueError(
                f"the checkpoint was written within a step, after {self._handed_out % self.pieces} of its"
                f" {self.pieces} pieces, and a private run can only go on between two steps: resume from another one"
            )
        for batch in self.loader:
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the position in the epoch."""
        steps, part = divmod(self._restored or self._handed_out, self.pieces)
        return {"steps": steps, "part": part}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from a position; steps cut into another number of pieces are no hindrance."""
        part = state_dict.get("part", 0)
        self._restored = state_dict.get("steps", 0) * self.pieces + (part if part < self.pieces else 1)

    def _cells(self) -> Iterator[list[Any]]:
        """Yield for each batch of this rank the samples it takes."""
        first = self.next_step()
        for step in range(first, first + self.steps - self._handed_out // self.pieces):
            chosen = self._chosen(step)
            for piece in range(self.pieces):
                cell = chosen[self.rank * self.pieces + piece :: self.ranks * self.pieces].tolist()
                yield [self._index(step, image, view) for image in cell for view in range(self.views)]

    def _chosen(self, step: int) -> torch.Tensor:
        if self.poisson:
            return self.random.chosen(self.samples, self.rate, step)
        epoch, place = divmod(step, self.steps)
        size = round(self.rate * self.samples)
        return self.random.permutation(self.samples, "shuffling", epoch)[place * size : (place + 1) * size]

    def _index(self, step: int, image: int, view: int) -> Any:
        return image if self._seeded is None else SeededIndex(self._seeded.seed, step, image, view)


def check_loader(loader: Any) -> None:
    """Check that a training loader can be taken over by `PrivateLoader`.

    Raises:
        ValueError: if it is no DataLoader with a length, or draws its samples in a way of its own.
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


class _Iterating:
    """A sampler that asks a function for an iterator."""

    def __init__(self, start: Callable[[], Iterator[list[Any]]]) -> None:
        self.start = start

    def __iter__(self) -> Iterator[list[Any]]:
        return self.start()


class _Pieces(Dataset[Any]):
    """Batches by the lists of their samples, empty ones too.

    Args:
        dataset: the samples.
        collate: makes a batch of them.
        any_index: of a sample, which an empty batch takes its shape from.
    """

    def __init__(self, dataset: Dataset[Any], collate: Callable[[Any], Any], any_index: Any) -> None:
        self.dataset, self.collate, self.any_index = dataset, collate, any_index

    def __getitem__(self, indices: list[Any]) -> Any:
        picked = indices or [self.any_index]
        several = getattr(self.dataset, "__getitems__", None)
        batch = self.collate(several(picked) if several else [self.dataset[index] for index in picked])
        return batch if indices else tree_map_only(torch.Tensor, lambda part: part[:0], batch)


def _as_it_is(batch: Any) -> Any:
    return batch
