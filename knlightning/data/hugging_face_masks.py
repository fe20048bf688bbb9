"""Images of the Hugging Face Hub, or in local Parquet or Arrow files, with a mask each."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from knlightning.checks import ArgumentError, check
from knlightning.data.folder import FolderImages
from knlightning.data.hugging_face import ImageColumn, TableDataModule
from knlightning.data.masked_files import MaskedFiles, MaskedFilesDataModule
from knlightning.data.segmentation import IGNORED

NAMES = "id2label.json"
"""The file in which datasets of the Hub name the numbers in their masks, as `{"0": "road", "1": "sky"}`."""


class HuggingFaceSegmentationDataModule(TableDataModule, MaskedFilesDataModule):
    """Images with a mask each of the Hugging Face Hub, or in a local folder of Parquet or Arrow files.

    `TableDataModule` says how they are read, `MaskedFilesDataModule` how they are augmented and evaluated. A mask is an
    image of one 8-bit channel with a number for each pixel.

    Args:
        path: Name of a dataset on the Hub, or a local folder.
        mask_column: Column of the masks.
        class_names: Names of the numbers 0, 1, 2 and so on in masks; None for those in the file `id2label.json` of the
            dataset.
        ignored_numbers: Numbers in masks, 0 to 255, of pixels that do not count. They are no classes.
        crop_size: `(height, width)` of training images.
        kwargs: Arguments of `TableDataModule` and `MaskedFilesDataModule`.

    Attributes:
        class_names: Names of the classes; empty until data or a checkpoint are read.

    Raises:
        ArgumentError: If an argument is out of range.
    """

    class_names: tuple[str, ...] = ()

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        mask_column: str = "mask",
        class_names: Sequence[str] | None = None,
        ignored_numbers: Sequence[int] = (IGNORED,),
        crop_size: tuple[int, int] = (512, 512),
        **kwargs: Any,
    ) -> None:
        super().__init__(path, crop_size=crop_size, **kwargs)
        within = all(0 <= number <= 255 for number in ignored_numbers)
        check(within, "ignored_numbers", ignored_numbers, "whole numbers from 0 to 255")
        self.mask_column, self.ignored_numbers, self.image_size = mask_column, ignored_numbers, crop_size
        self._given_names = class_names

    def find_class_names(self) -> tuple[str, ...]:
        """Name the classes before images are read; none if their names are not there."""
        with suppress(ArgumentError):  # it comes again when data are read, and can be told there
            return tuple(self._numbered_names().values())
        return ()

    def load(self, split: str) -> MaskedFiles:
        """Read the `table` of a split, and check it; its images are decoded later.

        Raises:
            ArgumentError: If classes have no names.
            ValueError: If masks are damaged, or differ from their images in size.
        """
        table = self.table(split, "image_column", "mask_column")
        names = self._numbered_names()
        self.class_names, self.label_ids = tuple(names.values()), tuple(names)
        where = f"{self.path}/{split}"
        images = ImageColumn(table, self.image_column, where)
        masks = ImageColumn(table, self.mask_column, f"{where}/{self.mask_column}", "mask_column")
        labels = {number: label for label, number in enumerate(names)} | dict.fromkeys(self.ignored_numbers, IGNORED)
        return self.masked(images, masks, labels, where)

    def load_predict(self, folder: str | os.PathLike[str]) -> FolderImages:
        with suppress(ArgumentError):  # a checkpoint names the classes too
            self.label_ids = tuple(self._numbered_names())
        return super().load_predict(folder)

    def _numbered_names(self) -> dict[int, str]:
        """Return the names of the classes by their numbers in masks.

        Raises:
            ArgumentError: If they are not given, and the dataset does not state them.
        """
        names = dict(enumerate(self._given_names or ()))
        if self._given_names is None:
            from huggingface_hub import hf_hub_download

            try:
                path = Path(self.path, NAMES)
                if not Path(self.path).is_dir():
                    path = Path(hf_hub_download(self.path, NAMES, repo_type="dataset", revision=self.revision))
                names = {int(number): str(name) for number, name in json.loads(path.read_text("utf-8")).items()}
            except (OSError, ValueError, AttributeError) as error:
                allowed = f"names of the numbers in masks, since {self.path} has no {NAMES} that can be read ({error})"
                raise ArgumentError("class_names", None, allowed) from error
        names = {number: name for number, name in sorted(names.items()) if number not in self.ignored_numbers}
        within = bool(names) and 0 <= min(names) <= max(names) <= 255
        check(within, "class_names", names, "names of numbers in masks from 0 to 255")
        return names
