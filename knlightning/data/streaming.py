"""Labelled images in Parquet files on any storage, of which the local disk holds a part at a time."""

import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from knlightning.checks import check, check_number
from knlightning.data.decoding import unreadable
from knlightning.data.hugging_face import names_of_values, numbered
from knlightning.data.image_files import EncodedImages, LabelledFiles
from knlightning.data.labelled_files import LabelledFilesDataModule
from knlightning.data.samplers import SeededIndex, SeededSampler, generator_of
from knlightning.data.shards import Shard, ShardCache, check_installed, find_shards, read_labels

AHEAD = 2
"""How many shards are copied before they are needed."""


def shard_order(seed: int, epoch: int, shards: int) -> Tensor:
    """Return the order in which an epoch comes to the shards, int64 `(shards,)`."""
    return torch.randperm(shards, generator=generator_of(seed, epoch, 1))


class ShardSampler(SeededSampler):
    """SeededSampler that comes to one shard after the other, and mixes the images of neighbours in that order.

    At each time about `mixed_shards` of them are in use. If there are no more than that, all images are mixed.

    Args:
        *args: Arguments of `TrainSampler`.
        shards: Number of the shard of each image, int64 `(samples,)`.
        mixed_shards: How many are mixed, at least 1.
    """

    def __init__(self, *args: Any, shards: Tensor, mixed_shards: int) -> None:
        super().__init__(*args)
        self.shards, self.mixed_shards = shards, mixed_shards
        self.sizes_of_shards = generator_of(*shards.bincount().tolist()).initial_seed()

    def order(self, generator: torch.Generator) -> Tensor:
        """Return the images of an epoch in their order."""
        order = super().order(generator)
        count = int(self.shards.max()) + 1
        if count <= self.mixed_shards:
            return order
        places = shard_order(self.seed, self.epoch, count).argsort()
        # the images of a shard are spread evenly over as many places as shards are mixed
        spread = torch.rand(len(order), generator=generator, dtype=torch.float64) * self.mixed_shards
        return order[(places[self.shards[order]] + spread).argsort()]


class ShardColumn(EncodedImages):
    """Encoded images in a column of shards, which are copied to the local disk when they are needed.

    Args:
        shards: The shards.
        lengths: How many images each has.
        copies: Their copies on the local disk.
        mixed_shards: How many of them an epoch mixes at a time.
    """

    def __init__(self, shards: Sequence[Shard], lengths: Sequence[int], copies: ShardCache, mixed_shards: int) -> None:
        self.shards, self.copies, self.mixed_shards = shards, copies, mixed_shards
        self.ends = np.cumsum(lengths)
        self.open: OrderedDict[int, Any] = OrderedDict()  # the copies that are mapped into memory

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"open": OrderedDict()}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def path_of(self, number: int) -> str:
        """Return the shard of an image, and its row there, as if it were a file."""
        shard, row = self._locate(number)
        return f"{self.shards[shard].path}/{row}"

    def find(self, number: int) -> tuple[str, bytes]:
        shard, row = self._locate(number)
        if shard not in self.open:
            self.open[shard] = self.copies.images(self.shards[shard])
            while len(self.open) > self.mixed_shards + AHEAD:
                self.open.popitem(last=False)
        self.open.move_to_end(shard)
        content = self.open[shard][row].as_py()
        if content is None:
            raise unreadable(self.path_of(number), ValueError("the row has no image"))
        return self.path_of(number), content

    def _locate(self, number: int) -> tuple[int, int]:
        """Return the number of an image's shard, and its row there."""
        shard = int(np.searchsorted(self.ends, number, "right"))
        return shard, number - (int(self.ends[shard - 1]) if shard else 0)

    def read_ahead(self, order: Sequence[int], shard: int) -> None:
        """Let the shards be copied that come after one in an order."""
        place = order.index(shard) + 1
        following = [self.shards[number] for number in order[place : place + AHEAD]]
        threading.Thread(target=_fetch, args=(self.copies, following), daemon=True).start()


class ShardImages(LabelledFiles):
    """Labelled images in shards, which are copied to the local disk when they are needed, or a little before.

    Args:
        images: The images.
        args: Arguments of `LabelledFiles` after the images.
    """

    images: ShardColumn

    def __init__(self, images: ShardColumn, *args: Any) -> None:
        super().__init__(images, *args)
        self._set_sampler()

    def _set_sampler(self) -> None:
        self.shards = np.searchsorted(self.images.ends, self.places, "right")  # of each image
        mixed, shards = self.images.mixed_shards, torch.from_numpy(self.shards)
        self.train_sampler = partial(ShardSampler, shards=shards, mixed_shards=mixed)

    def take(self, indices: Tensor) -> Self:
        subset = super().take(indices)
        subset._set_sampler()
        return subset

    def __getitem__(self, index: int | SeededIndex) -> Any:
        column = self.images
        shard = int(self.shards[index.image if isinstance(index, SeededIndex) else index])
        if shard not in column.open:
            if not isinstance(index, SeededIndex):
                column.read_ahead(range(len(column.shards)), shard)
            elif index.replaceable:  # private training draws from all shards at once
                column.read_ahead(shard_order(index.seed, index.epoch, len(column.shards)).tolist(), shard)
        return super().__getitem__(index)


def _fetch(copies: ShardCache, shards: Sequence[Shard]) -> None:
    with suppress(OSError):  # it comes again when the shard is needed, and can be told there
        for shard in shards:
            copies.fetch(shard)


class StreamingDataModule(LabelledFilesDataModule):
    """Labelled images in Parquet files in a folder or on a storage such as S3, more of them than the local disk holds.

    The files are those that `knl write-shards` writes, or any with a column of images and one of labels, as datasets of
    the Hugging Face Hub have. `root` is a local folder or a URL of a storage that fsspec knows;
    S3 needs `pip install 'knlightning[streaming]'`, and takes its keys and its endpoint from the environment or the
    files of the AWS command line (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, ...). Files are data alone: nothing in them
    is run.

    A file is copied whole into a cache on the local disk before its images are needed, once for all processes of a
    machine. An epoch comes to one file after the other, in a new order each time, and mixes the images of
    `mixed_shards` neighbours. This order is a function of the seed and the epoch, as everything else of a training
    image, so that runs are equal with any number of processes, and when resumed. Each machine reads all files.

    Class names are those that the files state as the feature `ClassLabel` of `datasets`; without it whole numbers are
    the labels themselves, and strings are numbered in their order. All else is as in `LabelledFilesDataModule`.

    Args:
        root: Folder of the files, or its URL.
        image_column: Column of the encoded images.
        label_column: Column of the labels.
        train_name: Split to train on: files `NAME-*.parquet`, or those in a folder of this name.
        val_name: Split to validate on; not read if `val_split` is above 0.
        test_name: Split to test on; None for `val_name`.
        mixed_shards: How many files are mixed at a time while training, at least 1. More mix better, and take more of
            the cache.
        cache_dir: Folder of the cache; None for `~/.cache/knlightning/shards`. Best on a local disk.
        cache_gigabytes: Most gigabytes (10^9 bytes) that it takes. If it holds all files, each is read once.
        kwargs: Arguments of `LabelledFilesDataModule`.

    Raises:
        ArgumentError: If an argument is out of range.
        ValueError: If pyarrow is not installed.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        image_column: str = "image",
        label_column: str = "label",
        train_name: str = "train",
        val_name: str = "validation",
        test_name: str | None = None,
        mixed_shards: int = 16,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_gigabytes: float = 50.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_number("mixed_shards", mixed_shards, at_least=1, integer=True)
        check_number("cache_gigabytes", cache_gigabytes, above=0)
        check_installed(type(self).__name__)
        self.root, self.image_column, self.label_column = os.fspath(root), image_column, label_column
        self.mixed_shards = mixed_shards
        self.cache_dir = Path(cache_dir or Path.home() / ".cache/knlightning/shards")
        self.cache_bytes = int(cache_gigabytes * 1e9)
        self.sampling = replace(self.sampling, train=train_name, val=val_name, test=test_name or val_name)

    def find_class_names(self) -> tuple[str, ...]:
        """Name the classes that the files state, before they are read; none if there are none or they state none."""
        with suppress(OSError, ValueError):  # the same error comes when data are read, and can be told there
            first = find_shards(self.root, self.sampling.train)[:1]
            return read_labels(self.root, first, self.image_column, self.label_column)[0].names
        return ()

    def load(self, split: str) -> ShardImages:
        """Read the labels of a split; images are read later.

        Raises:
            ArgumentError: If a column is missing, or the cache is too small.
            OSError: If files cannot be read, or there are none.
            ValueError: If files are missing, or labels are missing or of no class.
        """
        shards = find_shards(self.root, split)
        self._check_cache(shards, self.mixed_shards if split == self.sampling.train else 1)
        labels = read_labels(self.root, shards, self.image_column, self.label_column)
        values = [value for part in labels for value in part.values]
        check(len(values) > 0, "root", self.root, f"a folder with images in the split {split}")
        self.class_names = labels[0].names
        if not self.class_names:
            train = self.sampling.train
            self.class_names = names_of_values(values if split == train else self._values(train))
        numbers = numbered(values, self.class_names, f"{self.root}, {split}, column {self.label_column}")
        lengths = [len(part.values) for part in labels]
        if split == self.sampling.train:
            _warn_if_sorted(numbers, lengths, self.mixed_shards, len(self.class_names))
        copies = ShardCache(self.root, self.image_column, self.cache_dir, self.cache_bytes)
        images = ShardColumn(shards, lengths, copies, self.mixed_shards)
        return ShardImages(images, numbers, self.augmentation, self.evaluation, self.upright, self.skip_damaged)

    def _values(self, split: str) -> list[Any]:
        labels = read_labels(self.root, find_shards(self.root, split), self.image_column, self.label_column)
        return [value for part in labels for value in part.values]

    def _check_cache(self, shards: Sequence[Shard], mixed: int) -> None:
        """Check that the files in use at a time fit into the cache."""
        used = mixed + AHEAD + 1
        needed = sum(sorted((shard.size for shard in shards), reverse=True)[:used])
        check(
            needed <= self.cache_bytes,
            "cache_gigabytes",
            self.cache_bytes / 1e9,
            f"at least {needed / 1e9:.3g}, the size of the {min(used, len(shards))} files in use at a time",
            "A lower mixed_shards, or smaller files, need less.",
        )


def _warn_if_sorted(labels: Tensor, lengths: Sequence[int], mixed_shards: int, num_classes: int) -> None:
    """Warn if shards hold so few classes that an epoch goes from class to class."""
    if len(lengths) <= mixed_shards:
        return
    found = np.mean([len(part.unique()) for part in labels.split(list(lengths))])
    expected = np.mean([num_classes * (1 - (1 - 1 / num_classes) ** length) for length in lengths])
    if found < expected / 2 and found * mixed_shards < num_classes:
        warnings.warn(
            f"A file has images of {found:.1f} classes on average, of {num_classes}: the images are sorted by class, "
            f"and {mixed_shards} files at a time do not mix them. Set mixed_shards higher, or let `knl write-shards` "
            "write them in random order.",
            stacklevel=2,
        )
