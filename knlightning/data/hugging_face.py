"""Images of the Hugging Face Hub, or in local Parquet or Arrow files, with labels."""

import importlib.util
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from knlightning.checks import ArgumentError
from knlightning.data.base import BaseDataModule
from knlightning.data.decoding import unreadable
from knlightning.data.folder import abbreviated
from knlightning.data.image_files import EncodedImages, LabelledFiles
from knlightning.data.labelled_files import LabelledFilesDataModule

if TYPE_CHECKING:
    from datasets import Dataset

SAVED = ("dataset_dict.json", "state.json")
"""Files in a folder that `save_to_disk` has written."""


class ImageColumn(EncodedImages):
    """Encoded images in a column of a table.

    Args:
        table: A table of `datasets`.
        column: Name of the column.
        source: Where the table comes from; messages name an image by it, and by its row.
        argument: Name of the argument that says which column it is.

    Raises:
        ArgumentError: If it is no column of images.
    """

    def __init__(self, table: "Dataset", column: str, source: str, argument: str = "image_column") -> None:
        from datasets import Image as EncodedImage

        try:
            self.table = table.select_columns([column]).cast_column(column, EncodedImage(decode=False))
        except Exception as error:  # pyarrow and datasets have many for it
            raise ArgumentError(argument, column, f"a column of images: {source} cannot be read ({error})") from error
        self.column, self.source = column, source

    def __len__(self) -> int:
        return len(self.table)

    def path_of(self, number: int) -> str:
        """Return the source and the row of an image, as if it were a file."""
        return f"{self.source}/{number}"

    def find(self, number: int) -> tuple[str, bytes | None]:
        encoded = self.table[number][self.column]
        if encoded is None or encoded["bytes"] is encoded["path"] is None:
            raise unreadable(self.path_of(number), ValueError("the row has no image"))
        if encoded["bytes"] is None:  # the table names a file
            return encoded["path"], None
        return self.path_of(number), encoded["bytes"]


class TableDataModule(BaseDataModule):
    """Base of the datamodules that read the Hugging Face Hub, or a local folder of Parquet or Arrow files.

    They are read by the library `datasets` (`pip install 'knlightning[huggingface]'`). It downloads what it does not
    have yet, and copies the images into a cache of Arrow tables, from which rows are read in any order; local files
    need no network. Code that comes with a dataset is never run.

    Args:
        path: Name of a dataset on the Hub, such as `ILSVRC/imagenet-1k`, or a local folder; the latter may be one that
            `save_to_disk` has written.
        name: Name of a configuration of the dataset, if it has several.
        image_column: Column of the images.
        train_name: Split to train on.
        val_name: Split to validate on; not read if `val_split` is above 0.
        test_name: Split to test on; None for `val_name`, as is usual for ImageNet, whose test images have no labels.
            With `val_split` and no split of that name it is `test`, and without that the images held out.
        revision: Branch, tag or commit of a dataset on the Hub; None for the newest.
        cache_dir: Folder of the cache; None for the library's own, by default in the home directory.
        kwargs: Arguments of the next base class.

    Raises:
        ValueError: If `datasets` is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        image_column: str = "image",
        train_name: str = "train",
        val_name: str = "validation",
        test_name: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if importlib.util.find_spec("datasets") is None:
            raise ValueError(f"{type(self).__name__} needs datasets: pip install 'knlightning[huggingface]'.")
        self.path, self.name, self.revision = os.fspath(path), name, revision
        self.cache_dir = None if cache_dir is None else os.fspath(cache_dir)
        self.image_column, self.test_name = image_column, test_name
        self.sampling = replace(self.sampling, train=train_name, val=val_name, test=test_name or val_name)

    def setup(self, stage: str) -> None:
        """Read what a stage needs, and settle before which images to test on; see `BaseDataModule.setup`."""
        if stage == "test" and self.val_split > 0 and self.test_name is None:
            splits = self.stated()[0]
            there = [split for split in (self.sampling.val, "test") if split in splits]
            self.sampling = replace(self.sampling, test=[*there, self._validation][0])
        super().setup(stage)

    def stated(self) -> tuple[Collection[str], Mapping[str, Any]]:
        """Return names of the splits and features of the columns, before images are read; none if there are none."""
        from datasets import get_dataset_config_info, load_from_disk

        with suppress(OSError, ValueError):  # the same error comes when data are read, and can be told there
            if self.is_saved():
                saved, train = load_from_disk(self.path), self.sampling.train
                return saved if isinstance(saved, dict) else [train], _of_split(saved, train, train).features
            info = get_dataset_config_info(self.path, self.name, revision=self.revision, cache_dir=self.cache_dir)
            return info.splits or (), info.features or {}
        return (), {}

    def is_saved(self) -> bool:
        """Say whether `save_to_disk` has written the folder."""
        return any((Path(self.path) / file).is_file() for file in SAVED)

    def table(self, split: str, *columns: str) -> "Dataset":
        """Return the table of a split.

        Args:
            split: Its name.
            columns: Names of the arguments that name its columns.

        Raises:
            ArgumentError: If a column is missing.
            FileNotFoundError: If the dataset is neither a local folder nor on the Hub, or that cannot be reached.
            ValueError: If there is no such split.
        """
        from datasets import load_dataset, load_from_disk

        try:
            table = (
                _of_split(load_from_disk(self.path), split, self.sampling.train)
                if self.is_saved()
                else load_dataset(self.path, self.name, split=split, revision=self.revision, cache_dir=self.cache_dir)
            )
        except ValueError as error:
            raise ValueError(
                f"{self.path}: {error} The arguments name, train_name, val_name and test_name say what is read."
            ) from error
        except OSError as error:
            if os.path.exists(self.path):
                raise
            raise FileNotFoundError(
                f"There is no folder {os.path.abspath(self.path)}, and the Hub does not have {self.path} or "
                f"cannot be reached ({error})."
            ) from error
        for argument in columns:
            if (column := getattr(self, argument)) not in table.column_names:
                raise ArgumentError(
                    argument, column, f"one of the columns of {self.path}: {abbreviated(table.column_names)}"
                )
        if not len(table):
            raise ValueError(f"{self.path}: there are no images in the split {split}.")
        return table


class HuggingFaceDataModule(TableDataModule, LabelledFilesDataModule):
    """Labelled images of the Hugging Face Hub, or in a local folder of Parquet or Arrow files, see `TableDataModule`.

    Classes are those of the feature `ClassLabel` of the labels; without it whole numbers are the labels themselves,
    and strings are numbered in their order. How images are decoded, augmented and evaluated is the same as for
    folders of images, see `LabelledFilesDataModule`. For images with masks there is
    `HuggingFaceSegmentationDataModule`.

    Args:
        path: Name of a dataset on the Hub, or a local folder.
        label_column: Column of the labels.
        kwargs: Arguments of `TableDataModule` and `LabelledFilesDataModule`.

    Attributes:
        class_names: Names of the classes; empty until data or a checkpoint are read.
    """

    def __init__(self, path: str | os.PathLike[str], *, label_column: str = "label", **kwargs: Any) -> None:
        super().__init__(path, **kwargs)
        self.label_column = label_column

    def find_class_names(self) -> tuple[str, ...]:
        """Name the classes that the dataset states, before images are read; none if it is not there or states none."""
        return stated_names(self.stated()[1], self.label_column)

    def load(self, split: str) -> LabelledFiles:
        """Read the `table` of a split; its images are decoded later.

        Raises:
            ValueError: If labels are missing or of no class.
        """
        columns = ("image_column", "label_column")
        table = self.table(split, *columns)
        self.class_names = stated_names(table.features, self.label_column)
        values = table[self.label_column][:]
        if not self.class_names:
            train = self.sampling.train
            self.class_names = names_of_values(
                values if split == train else self.table(train, *columns)[self.label_column][:]
            )
        labels = numbered(values, self.class_names, f"{self.path}/{split}, column {self.label_column}")
        images = ImageColumn(table, self.image_column, f"{self.path}/{split}")
        return LabelledFiles(images, labels, self.augmentation, self.evaluation, self.upright, self.skip_damaged)


def _of_split(saved: Any, split: str, train: str) -> "Dataset":
    """Return a table of those that `save_to_disk` has written: one for each split, or that to train on alone."""
    tables = saved if isinstance(saved, dict) else {train: saved}
    if split not in tables:
        raise ValueError(f"There is no split {split}. The splits are {abbreviated(list(tables))}.")
    return tables[split]


def stated_names(features: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """Return the names of the classes that the feature of a column states; none if it does not.

    Args:
        features: Of a table.
        column: Column of the labels.
    """
    return tuple(getattr(features.get(column), "names", None) or ())


def names_of_values(values: Sequence[Any]) -> tuple[str, ...]:
    """Name the classes by the values of the training images.

    Args:
        values: Whole numbers from 0, without a gap; or strings.

    Raises:
        ValueError: If they are neither.
    """
    if all(isinstance(value, str) for value in values):
        return tuple(sorted(set(values)))
    if all(isinstance(value, int) for value in values) and sorted(set(values)) == list(range(len(set(values)))):
        return tuple(str(number) for number in range(len(set(values))))
    raise ValueError(
        "Labels must be of the feature ClassLabel, strings, or the numbers from 0 to one below the number of classes, "
        f"got {abbreviated(list(dict.fromkeys(map(str, values))))}."
    )


def numbered(values: Sequence[Any], names: Sequence[str], where: str) -> Tensor:
    """Return labels as numbers.

    Args:
        values: Numbers or names of classes.
        names: Names of all classes.
        where: Where the values come from, for the message.

    Returns:
        int64 `(N,)`.

    Raises:
        ValueError: If a value is none of a class.
    """
    numbers: dict[Any, int] = {number: number for number in range(len(names))}
    if isinstance(values[0], str):
        numbers = {name: number for number, name in enumerate(names)}
    if unknown := {value: None for value in values if value not in numbers}:
        raise ValueError(
            f"{where}: {abbreviated([str(value) for value in unknown])} is none of the {len(names)} classes. A split "
            "without labels often has -1 throughout; it cannot be evaluated."
        )
    return torch.tensor([numbers[value] for value in values])
