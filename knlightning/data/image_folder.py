"""Any folder of images in classes, decoded while it is trained on."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from knlightning.data import decoding
from knlightning.data.decoding import decoded
from knlightning.data.folder import abbreviated, find_classes, find_images_in, is_hidden, list_folders
from knlightning.data.image_files import ImageFiles
from knlightning.data.labelled_files import LabelledFilesDataModule

TRAIN_FOLDER = "train"
TEST_FOLDER = "test"


class ImageFolderDataModule(LabelledFilesDataModule):
    """Any images in classes: `ROOT/train/CLASS/*` and `ROOT/val/CLASS/*`, and `ROOT/test/CLASS/*` if there are some.

    They may also lie in `ROOT/CLASS/*`; `val_split` then says how many are held out for validation.

    Classes are numbered in the order of the names of their folders. Files are decoded when they are needed, in worker
    processes, and turned upright as their EXIF data say. How images are augmented, and evaluated, says
    `LabelledFilesDataModule`.

    Args:
        root: Folder in which the folders of the splits lie, or those of the classes.
        train_folder: Name of the folder to train on; None for `train`, or for `root` itself if the folders of the
            classes lie there.
        val_folder: Name of the folder to validate on; not read if `val_split` is above 0.
        test_folder: Name of the folder to test on; None for `test` if that has folders of classes. Otherwise
            **`val_folder` serves for testing too**, as is usual for ImageNet; without it the images held out do.
        kwargs: Arguments of `LabelledFilesDataModule`.

    Attributes:
        class_names: Names of the folders; empty until data or a checkpoint are read.

    Raises:
        ArgumentError: If an argument is out of range.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        train_folder: str | None = None,
        val_folder: str = "val",
        test_folder: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)
        if train_folder is None:
            split = any((self.root / name).is_dir() for name in (TRAIN_FOLDER, val_folder, TEST_FOLDER))
            train_folder = "." if has_classes(self.root) and not split else TRAIN_FOLDER
        self.sampling = replace(self.sampling, train=train_folder, val=val_folder)
        if test_folder is None:
            held_out = self.val_split > 0 and not (self.root / val_folder).is_dir()
            others = self._validation if held_out else val_folder
            test_folder = TEST_FOLDER if has_classes(self.root / TEST_FOLDER) else others
        self.sampling = replace(self.sampling, test=test_folder)

    def name_classes(self, folders: list[str], where: Path) -> tuple[str, ...]:
        """Name the classes; a subclass may give other names than those of the folders.

        Args:
            folders: Names of the folders of all classes, in the order of the labels.
            where: In which folder they were found.
        """
        return tuple(folders)

    def find_class_names(self) -> tuple[str, ...]:
        """Name the classes of the training images, whose files are not listed for it; none if they are not there."""
        train = self.root / self.sampling.train
        return self.name_classes(find_classes(train), train) if has_classes(train) else ()

    def load(self, split: str) -> ImageFiles:
        """List the files of a split.

        Raises:
            FileNotFoundError: If the folder does not exist.
            ValueError: If it has no folders, has folders of classes that the training images do not have, or a folder
                without images.
        """
        where = self.root / split
        found = find_classes(where)
        # without training images, those to evaluate on say which classes there are
        train = self.root / self.sampling.train
        reference = train if train.is_dir() else where
        classes = found if reference == where else find_classes(reference)
        if unknown := sorted({*found} - {*classes}):
            raise ValueError(
                f"{where.absolute()}: folders of classes that {reference.absolute()} does not have: "
                f"{abbreviated(unknown)}."
            )
        self.class_names = self.name_classes(classes, reference)
        files = dict(zip(found, find_images_in(where, found), strict=True))
        if empty := [name for name in found if not files[name]]:
            raise ValueError(
                f"{where.absolute()}: no images in the folders {abbreviated(empty)}. Fill or remove them; image files "
                "have a suffix such as .jpg or .png."
            )
        numbers = {name: number for number, name in enumerate(classes)}
        return _FolderFiles(
            where,
            [os.path.relpath(path, where) for name in found for path in files[name]],
            torch.tensor([numbers[name] for name in found for _ in files[name]]),
            self.augmentation,
            self.evaluation,
            self.upright,
            self.skip_damaged,
        )


class _FolderFiles(ImageFiles):
    """Files that are read by `decoded` of this module: a program can put its own decoder in its place."""

    def decoded(self, index: int) -> Image.Image:
        return decoded(self.path_of(index), self.upright)

    def pixels(self, index: int) -> Tensor:
        return super().pixels(index) if decoded is decoding.decoded else tv.pil_to_tensor(self.decoded(index))


def has_classes(folder: Path) -> bool:
    """Say whether there are folders of classes in a folder."""
    return folder.is_dir() and not all(map(is_hidden, list_folders(folder)))
