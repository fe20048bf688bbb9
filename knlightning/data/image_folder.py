"""Any folder of images in classes, decoded while it is trained on."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms import v2

from knlightning.checks import check_number
from knlightning.data.base import BaseDataModule, Scaling
from knlightning.data.decoding import decoded, fitted
from knlightning.data.folder import (
    FolderImages,
    abbreviated,
    find_classes,
    find_images_in,
    is_hidden,
    list_folders,
)
from knlightning.data.image_files import ImageFiles
from knlightning.data.samplers import Sampling

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TEST_FOLDER = "test"


class ImageFolderDataModule(BaseDataModule):
    """Any images in classes: `ROOT/train/CLASS/*` and `ROOT/val/CLASS/*`, and `ROOT/test/CLASS/*` if there are some.

    Classes are numbered in the order of the names of their folders. Files are decoded when they are needed, in worker
    processes, and turned upright as their EXIF data say. A training image is cropped to a random part of 8 to 100 % of
    its area with an aspect ratio of 3/4 to 4/3, scaled, and mirrored with probability 1/2 (torchvision's
    `RandomResizedCrop` and `RandomHorizontalFlip`); an image to evaluate, or to predict on, is scaled by its shorter
    side and cropped to its centre. How an image is augmented is a function of the run's seed, the epoch, the image and
    the repetition alone, so that runs are equal with any number of processes, and when resumed. Images come to the
    device as uint8 and are scaled to float there.

    Args:
        root: Folder in which the folders of the splits lie.
        train_folder: Name of the folder to train on.
        val_folder: Name of the folder to validate on; not read if `val_split` is above 0.
        test_folder: Name of the folder to test on; None for `test` if that has folders of classes. Otherwise
            **`val_folder` serves for testing too**, as is usual for ImageNet.
        train_size: Height and width of training images.
        eval_resize: Length to which the shorter side of other images is scaled.
        eval_size: Height and width of their centre crop.
        trivial_augment: Whether each training image is changed by one random operation too (`TrivialAugmentWide`).
        random_erasing: Probability with which a random rectangle of a training image is set to the mean colour.
        repeated_augmentation: How many times an epoch shows each of the images that it shows, each time augmented
            differently. The length of the epoch stays, so that it shows fewer different images. See `TrainSampler`.
        skip_damaged: Whether a file that cannot be decoded is skipped, and counted in a warning at the end of an
            epoch; in training, the next file in the list takes its place, so that batches stay full. In private
            training it contributes nothing. If not, it is an error.
        scaling: `unit` divides pixels by 255; `standard` then subtracts ImageNet's mean and divides by its standard
            deviation.
        kwargs: Arguments of `BaseDataModule`. Images that `val_split` holds out take the place of `val_folder`.

    Attributes:
        class_names: Names of the folders; empty until data or a checkpoint are read.

    Raises:
        ArgumentError: If an argument is out of range.

    Source: TrivialAugment is S. Müller and F. Hutter, ICCV 2021; random erasing is Z. Zhong et al., AAAI 2020.
    """

    class_names: tuple[str, ...] = ()
    mean = IMAGENET_MEAN
    std = IMAGENET_STD
    upright = True
    """Whether images are turned as their EXIF data say when training and evaluating; always when predicting."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        train_folder: str = "train",
        val_folder: str = "val",
        test_folder: str | None = None,
        train_size: int = 224,
        eval_resize: int = 256,
        eval_size: int = 224,
        trivial_augment: bool = False,
        random_erasing: float = 0.0,
        repeated_augmentation: int = 1,
        skip_damaged: bool = False,
        *,
        scaling: Scaling = "standard",
        **kwargs: Any,
    ) -> None:
        super().__init__(scaling=scaling, **kwargs)
        check_number("train_size", train_size, at_least=1, integer=True)
        check_number("eval_size", eval_size, at_least=1, integer=True)
        check_number("eval_resize", eval_resize, at_least=eval_size, integer=True, hint="It must cover eval_size.")
        check_number("random_erasing", random_erasing, at_least=0, at_most=1)
        check_number("repeated_augmentation", repeated_augmentation, at_least=1, integer=True)
        self.root = Path(root)
        self.skip_damaged = skip_damaged
        self.image_size = (eval_size, eval_size)
        self.eval_resize = eval_resize
        test_folder = test_folder or (TEST_FOLDER if _has_classes(self.root / TEST_FOLDER) else val_folder)
        self.sampling = Sampling(train_folder, val_folder, test_folder, repeats=repeated_augmentation)
        # a rectangle of the mean colour is one of zeros once it is scaled by `standard`
        erasing = v2.RandomErasing(random_erasing, value=[round(255 * mean) for mean in self.mean])
        self.augmentation = v2.Compose(
            [
                v2.RandomResizedCrop(train_size),
                v2.RandomHorizontalFlip(),
                *([v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)] if trivial_augment else []),
                v2.PILToTensor(),
                *([erasing] if random_erasing else []),
            ]
        )

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
        return self.name_classes(find_classes(train), train) if _has_classes(train) else ()

    def load_predict(self, folder: str | os.PathLike[str]) -> FolderImages:
        return FolderImages(folder, self.image_size, self.eval_resize, skip_damaged=True)

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
        return ImageFiles(
            where,
            [os.path.relpath(path, where) for name in found for path in files[name]],
            torch.tensor([numbers[name] for name in found for _ in files[name]]),
            self.augmentation,
            partial(fitted, size=self.image_size, resize=self.eval_resize),
            self.upright,
            self.skip_damaged,
            decode=_decode,
        )


def _has_classes(folder: Path) -> bool:
    return folder.is_dir() and not all(map(is_hidden, list_folders(folder)))


def _decode(path: str, upright: bool) -> Image.Image:
    return decoded(path, upright)  # looked up when called: a program can put its own decoder in its place
