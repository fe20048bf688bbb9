"""Any folder of images in classes, decoded while it is trained on."""

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2

from knlightning.data.base import BaseDataModule, LabelledImages, Scaling
from knlightning.data.folder import decoded, find_classes, find_images, fitted, listed
from knlightning.data.loader import ResumableLoader
from knlightning.data.samplers import Draw, DrawSampler

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageFiles(LabelledImages):
    """Labelled image files, decoded when they are asked for.

    An item that is asked for by number is brought to the form for evaluation. One that is asked for by a `Draw` is
    varied, with random numbers that are a function of the draw alone (`Draw.random`).

    Args:
        folder: Where the files lie.
        names: Their paths below it.
        labels: int64 `(N,)`.
        augmentation: Makes a training image, uint8 `(3, H, W)`, of a decoded one.
        evaluation: The same for evaluation.
        upright: Whether images are turned as their EXIF data say.
        skip_damaged: What is done about a file that cannot be decoded. If not set, that is an error. If set, a draw
            gives the next file in the list that can be decoded, with the label of that one, and a number gives None.

    Attributes:
        damaged: bool `(N,)`, which files were met that could not be decoded; shared by all processes that read.
    """

    damaged: Tensor
    _reported: int

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        labels: Tensor,
        augmentation: Callable[[Image.Image], Tensor],
        evaluation: Callable[[Image.Image], Tensor],
        upright: bool = True,
        skip_damaged: bool = False,
    ) -> None:
        self.folder = folder
        # One block of memory: processes that are forked would copy a list of strings by counting references to them
        self.names = np.array([os.fsencode(name) for name in names])
        self.labels = labels
        self.augmentation, self.evaluation = augmentation, evaluation
        self.upright, self.skip_damaged = upright, skip_damaged
        self._watch()

    def __getitem__(self, item: int | Draw) -> tuple[Tensor, int] | None:
        if isinstance(item, Draw):
            return self._drawn(item)
        image = self._decoded(item)
        return None if image is None else (self.evaluation(image), int(self.labels[item]))

    @property
    def strata(self) -> Tensor:
        return self.labels

    def take(self, rows: Tensor) -> Self:
        part = copy.copy(self)
        part.names, part.labels = self.names[rows.numpy()], self.labels[rows]
        part._watch()
        return part

    @staticmethod
    def collate(samples: Any) -> tuple[Tensor, Tensor]:
        read = [sample for sample in samples if sample is not None]
        if not read:
            return torch.empty(0), torch.empty(0)
        images, labels = default_collate(read)
        return images, labels

    def path(self, index: int) -> str:
        """Return the path of a file."""
        return os.path.join(self.folder, os.fsdecode(self.names[index]))

    def report(self) -> None:
        """Warn of damaged files, if any were met since the last time."""
        found = self.damaged.nonzero()[:, 0].tolist()
        if len(found) > self._reported:
            self._reported = len(found)
            warnings.warn(
                f"{len(found)} of the {len(self)} images could not be read so far, and were left out (in training, "
                f"others took their places): {listed([self.path(index) for index in found])}.",
                stacklevel=2,
            )

    def _watch(self) -> None:
        self._reported = 0
        self.damaged = torch.zeros(len(self), dtype=torch.bool).share_memory_()

    def _drawn(self, draw: Draw) -> tuple[Tensor, int]:
        index = draw.image
        image = self._decoded(index)
        while image is None:
            index = (index + 1) % len(self)
            if index == draw.image:
                raise ValueError(f"{self.folder}: none of the {len(self)} images can be read.")
            image = self._decoded(index)
        with draw.random():
            return self.augmentation(image), int(self.labels[index])

    def _decoded(self, index: int) -> Image.Image | None:
        try:
            return decoded(self.path(index), self.upright)
        except ValueError:
            if not self.skip_damaged:
                raise
            self.damaged[index] = True
            return None


class _Reporting(DataLoader[Any]):
    """Leaves out batches of which nothing could be read, and reports damaged files at the end of a pass."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override] # see ResumableLoader
        try:
            for batch in super().__iter__():
                if len(batch[1]):
                    yield batch
        finally:  # a limit on batches ends a pass too
            if isinstance(self.dataset, ImageFiles):
                self.dataset.report()


class _ReportingResumableLoader(_Reporting, ResumableLoader):
    pass


class ImageFolderDataModule(BaseDataModule):
    """Any images in classes: `ROOT/train/CLASS/*` and `ROOT/val/CLASS/*`, and `ROOT/test/CLASS/*` if there are some.

    Classes are numbered in the order of the names of their folders. Files are decoded when they are needed, in
    processes of their own, and turned upright as their EXIF data say. A training image is cut to a random part of
    8 to 100 % of its area with an aspect ratio of 3/4 to 4/3, scaled, and mirrored with probability 1/2 (torchvision's
    `RandomResizedCrop` and `RandomHorizontalFlip`); an image to evaluate, or to predict on, is scaled by its shorter
    side and cut to its centre. How an image is varied is a function of the run's seed, the epoch, the image and the
    repetition alone, so that runs are alike with any number of processes, and when resumed. Images come to the device
    as uint8 and are scaled to float there.

    Args:
        root: Folder in which the folders of the parts lie.
        train_folder: Name of the folder to train on.
        val_folder: Name of the folder to validate on; not read if `val_split` is above 0.
        test_folder: Name of the folder to test on; None to **test on `val_folder`**, as is usual for ImageNet.
        train_size: Height and width of training images.
        eval_resize: Length to which the shorter side of other images is scaled.
        eval_size: Height and width of what is cut out of them then.
        trivial_augment: Whether to vary training images by one random operation each too (`TrivialAugmentWide`).
        random_erasing: Probability with which a random rectangle of a training image is set to the mean colour.
        repeated_augmentation: How many times an epoch shows each of the images that it shows, varied differently; it
            stays as long as it is, so that other images wait for a later epoch. See `TrainSampler`.
        skip_damaged: Whether a file that cannot be decoded is left out, and counted in a warning at the end of an
            epoch; in training, the next file in the list takes its place, so that batches stay full. If not set, it is
            an error.
        batch_size: Training images in a batch, on each device.
        eval_batch_size: The same for validation, test and prediction; None for `batch_size`.
        scaling: `unit` divides pixels by 255; `standard` then subtracts ImageNet's mean and divides by its standard
            deviation.
        val_split: Fraction of the training images, 0 to below 1, held out for validation with the same share of each
            class, instead of `val_folder`.
        split_seed: Seed of that split.
        num_workers: Processes that decode, for each device; None for the processors there are, 16 at most.
        pin_memory: Whether batches are put into page-locked memory; None if training on a CUDA device.
        predict_dir: Folder of images to predict on.

    Attributes:
        class_names: Names of the folders; empty until data or a checkpoint were read.

    Raises:
        ValueError: An argument is out of range.

    Source: TrivialAugment is S. Müller and F. Hutter, ICCV 2021; random erasing is Z. Zhong et al., AAAI 2020.
    """

    class_names: tuple[str, ...] = ()
    mean = IMAGENET_MEAN
    std = IMAGENET_STD
    upright = True
    """Whether images are turned as their EXIF data say when training and evaluating; always when predicting."""

    _train_loader = _ReportingResumableLoader
    _eval_loader = _Reporting
    _train_sampler = DrawSampler

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
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        scaling: Scaling = "standard",
        val_split: float = 0.0,
        split_seed: int = 0,
        num_workers: int | None = None,
        pin_memory: bool | None = None,
        predict_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            scaling=scaling,
            val_split=val_split,
            split_seed=split_seed,
            num_workers=num_workers,
            pin_memory=pin_memory,
            predict_dir=predict_dir,
        )
        for name, value, allowed, ok in (
            ("train_size", train_size, "1 or more", train_size >= 1),
            ("eval_size", eval_size, "1 or more", eval_size >= 1),
            ("eval_resize", eval_resize, f"eval_size ({eval_size}) or more", eval_resize >= eval_size),
            ("random_erasing", random_erasing, "a probability, 0 to 1", 0 <= random_erasing <= 1),
            ("repeated_augmentation", repeated_augmentation, "1 or more", repeated_augmentation >= 1),
        ):
            if not ok:
                raise ValueError(f"{name}={value!r}: must be {allowed}.")
        self.root = Path(root)
        self.skip_damaged = skip_damaged
        self.image_size = (eval_size, eval_size)
        self._train, self._val, self._test = train_folder, val_folder, test_folder or val_folder
        self._resize = eval_resize
        self._repeats = repeated_augmentation
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
        """Name the classes; a subclass may call them otherwise than their folders.

        Args:
            folders: Names of the folders of all classes, in the order of the labels.
            where: In which folder they were found.
        """
        return tuple(folders)

    def _load(self, source: str) -> ImageFiles:
        """List the files of a part."""
        where = self.root / source
        found = find_classes(where)
        # without training images, those to evaluate on say which classes there are
        reference = self.root / self._train if (self.root / self._train).is_dir() else where
        classes = find_classes(reference)
        if unknown := sorted({*found} - {*classes}):
            raise ValueError(
                f"{where.absolute()}: folders of classes that {reference.absolute()} does not have: {listed(unknown)}."
            )
        self.class_names = self.name_classes(classes, reference)
        files = {name: find_images(where / name) for name in found}
        if empty := [name for name in found if not files[name]]:
            raise ValueError(
                f"{where.absolute()}: no images in the folders {listed(empty)}. Fill them or take them out; files are "
                f"known by their suffix, such as .jpg or .png."
            )
        numbers = {name: number for number, name in enumerate(classes)}
        return ImageFiles(
            where,
            [os.path.relpath(path, where) for name in found for path in files[name]],
            torch.tensor([numbers[name] for name in found for _ in files[name]]),
            self.augmentation,
            partial(fitted, size=self.image_size, resize=self._resize),
            self.upright,
            self.skip_damaged,
        )
