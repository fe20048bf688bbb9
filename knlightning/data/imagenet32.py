"""ImageNet at 32x32 pixels, from npz files, pickles or folders.

Source: P. Chrabaszcz, I. Loshchilov, F. Hutter, A Downsampled Variant of ImageNet as an Alternative to the CIFAR
datasets, arXiv:1707.08819.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from knlightning.data.datasets import TensorImages
from knlightning.data.folder import abbreviated, find_classes
from knlightning.data.image_cache import MappedImages, mapped, write_records
from knlightning.data.imagenet32_files import CLASS_MAP, find_sources, read_blocks, read_class_map
from knlightning.data.imagenet_archives import NUM_CLASSES
from knlightning.data.in_memory import ImageDataModule
from knlightning.data.labelled_files import IMAGENET_MEAN, IMAGENET_STD
from knlightning.data.transforms import random_crop, random_horizontal_flip
from knlightning.protocols import batch_independent


class ImageNet32DataModule(ImageDataModule):
    """ImageNet at 32x32 pixels: 1,281,167 training and 50,000 validation images in 1000 classes.

    The validation images serve for testing; for validation too, if `val_split` is 0. Reads the first of these that is
    there:

    - `ROOT/Imagenet32_train_npz/train_data_batch_{1, ..., 10}.npz` and `ROOT/Imagenet32_val_npz/val_data.npz`, or these
      files in `ROOT` itself;
    - pickles `ROOT/{train_data_batch_1, ..., train_data_batch_10, val_data}`, without running code that one might hold;
    - `ROOT/{train,val}/CLASS/*`, image files of 32x32 pixels in folders of 1000 classes.

    **Order of the labels.** Those of npz files and pickles are in the order of the ImageNet devkit (the first class is
    n02119789, a kit fox; n01440764, a tench, is number 448 from 0). Folders are numbered in the order of their names,
    as in torchvision (the tench is number 0), unless a file `ROOT/map_clsloc.txt` is there, with lines
    `wnid number name` and numbers from 1: then they are in the devkit's order too. A network trained with one order is
    of no use with the other. The file also gives the names of the classes; without it they are "class 1" to
    "class 1000", or the names of their folders.

    The images take 3.9 GB. When they are first read they are written into one file,
    `imagenet32-{train,val}-<digest of the sources' names, sizes and times>.npy`, which all processes on a machine
    then map into their memory and share. It may be deleted when nothing runs.

    Args:
        root: Folder in which the data lie.
        cache_dir: Folder of that file; None for `root`. Best on a local disk.
        augment: Whether training images are padded by 4 pixels, cropped at random and mirrored with probability 1/2.
        kwargs: Arguments of `ImageDataModule`.

    Raises:
        ArgumentError: If an argument is out of range.
    """

    class_names: tuple[str, ...] = tuple(f"class {number}" for number in range(1, NUM_CLASSES + 1))
    mean = IMAGENET_MEAN
    std = IMAGENET_STD
    image_size = (32, 32)

    def __init__(
        self,
        root: str | os.PathLike[str] = "data",
        cache_dir: str | os.PathLike[str] | None = None,
        *,
        augment: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(augment=augment, **kwargs)
        self.root = Path(root)
        self.cache_dir = Path(root if cache_dir is None else cache_dir)

    def prepare_data(self) -> None:
        """Write the cache of what the stage needs, in one process of a machine, while the others wait."""
        stage = "fit" if self.trainer is None else self.trainer.state.fn
        held_out = self.val_split > 0
        if stage == "fit" or (stage == "validate" and held_out):
            self._cache(train=True)
        if stage == "test" or (stage in ("fit", "validate") and not held_out):
            self._cache(train=False)

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        """Map the images into memory, and name the classes.

        Returns:
            Images, uint8 `(N, 3, 32, 32)`, and labels, int64 `(N,)`.

        Raises:
            FileNotFoundError: If files are missing; says which, and where.
            ValueError: If a file is damaged or of another format; says which, and what was found.
        """
        records = mapped(self._cache(train))
        labels = torch.from_numpy(records["label"].astype(np.int64))
        folders, others = self._folders(train), self._folders(not train)
        if class_map := read_class_map(self.root):
            if unknown := [name for name in folders or [] if name not in class_map]:
                raise ValueError(f"{self.root / CLASS_MAP}: does not have the folders {abbreviated(unknown)}.")
            if folders:
                place = {wnid: number for number, wnid in enumerate(class_map)}
                labels = torch.tensor([place[wnid] for wnid in folders])[labels]
            self.class_names = distinct(list(class_map.values()))
        elif others not in (None, folders):
            raise ValueError(
                f"{self.root.absolute()}: the classes of the training and of the validation images are numbered in "
                f"different orders, by files and by folders or by folders of other names. A file {CLASS_MAP} there "
                "would give files and folders named by WordNet ids one order."
            )
        elif folders:
            self.class_names = tuple(folders)
        return torch.from_numpy(records["image"]), labels

    @batch_independent()
    def augmentation(self, images: Tensor) -> Tensor:
        """Pad each image by 4 pixels and crop at random; mirror half of them."""
        return random_horizontal_flip(random_crop(images, padding=4))

    def load(self, split: str) -> TensorImages:
        return MappedImages(self._cache(split == self.sampling.train), super().load(split).labels)

    def _folders(self, train: bool) -> list[str] | None:
        """Return the names of the folders of classes; an empty list for files, None if there is neither."""
        sources = find_sources(self.root, train)
        return None if not sources else find_classes(sources[0]) if sources[0].is_dir() else []

    def _cache(self, train: bool) -> Path:
        """Return the cache of a split, after writing it if there is none of these sources."""
        split = "train" if train else "val"
        sources = find_sources(self.root, train)
        if not sources:
            raise FileNotFoundError(
                f"There are no {split} images of ImageNet 32x32 in {self.root.absolute()}: looked for "
                f"Imagenet32_{split}_npz/*.npz, for {'train_data_batch_1 to 10' if train else 'val_data'}, and for "
                f"{split}/CLASS/*. Set root to the folder that holds them."
            )
        # a folder's time changes with the files in it
        stamped = sorted(sources[0].iterdir()) if sources[0].is_dir() else sources
        stamps = [(p.name, p.is_file() and p.stat().st_size, p.stat().st_mtime_ns) for p in stamped]
        digest = hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]
        path = self.cache_dir / f"imagenet32-{split}-{digest}.npy"
        if not path.is_file():
            rank_zero_info(f"Writing the {split} images of ImageNet 32x32 into {path}; this is done once.")
            write_records(path, read_blocks(sources))
        return path


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Number names that occur again: the devkit calls two classes crane, for example."""
    return tuple(
        f"{name} ({names[:place].count(name) + 1})" if name in names[:place] else name
        for place, name in enumerate(names)
    )
