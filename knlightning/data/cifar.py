"""CIFAR-10 and CIFAR-100, from their Python files.

Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009,
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import os
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knlightning.data.in_memory import ImageDataModule
from knlightning.data.transforms import random_crop, random_horizontal_flip
from knlightning.data.unpickling import load_pickle, pixel_rows, require_key
from knlightning.internals.torchvision import CIFAR10, CIFAR100, check_integrity, download_url
from knlightning.protocols import batch_independent

# in the order of the labels; taken from the dataset's own list once that is read
_CIFAR10_NAMES = "airplane automobile bird cat deer dog frog horse ship truck"


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32 pixels in 10 classes.

    Reads `ROOT/cifar-10-batches-py/{data_batch_1, ..., data_batch_5, test_batch, batches.meta}`, without running code
    that a file might hold. While training, images are padded by 4 pixels, cropped at random and mirrored with
    probability 1/2.

    Args:
        root: Folder in which the dataset's folder lies.
        download: Whether to download the dataset (170 MB) if files are missing or have another checksum than the
            published ones, which are then replaced; the archive's checksum is verified.
        kwargs: Arguments of `ImageDataModule`.

    Raises:
        ArgumentError: If an argument is out of range.
    """

    class_names = tuple(_CIFAR10_NAMES.split())
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2471, 0.2435, 0.2616)
    image_size = (32, 32)
    source: type[CIFAR10] = CIFAR10  # names of files, address and checksum; torchvision reads nothing
    label_key = "labels"

    def __init__(self, root: str | os.PathLike[str] = "data", download: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)
        self.download = download

    @property
    def folder(self) -> Path:
        """Where the dataset's files lie."""
        return self.root / self.source.base_folder

    def prepare_data(self) -> None:
        """Download the dataset if asked to, and files are missing or damaged.

        Raises:
            OSError: If the download fails, or its checksum is wrong.
        """
        if not self.download or not self._differing():
            return
        source = self.source
        try:
            download_url(source.url, self.root, filename=source.filename, md5=source.tgz_md5)
            with tarfile.open(self.root / source.filename) as archive:
                archive.extractall(self.root, filter="data")
        except (OSError, RuntimeError, tarfile.TarError, EOFError, zlib.error) as error:
            raise OSError(
                f"{source.url} could not be downloaded to {self.root.absolute()}: {error}. Get it in another way "
                "and unpack it there."
            ) from error

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        """Read the training or the test images, and the names of the classes.

        Raises:
            FileNotFoundError: If files are missing; says which, where, and how to get them.
            ValueError: If a file is damaged or of another format; says which, and what was found.
        """
        if missing := self._missing():
            raise FileNotFoundError(
                f"{', '.join(missing)} missing in {self.folder.absolute()}. Set download to true, or unpack "
                f"{self.source.url} in {self.root.absolute()}, or set root to the folder that holds "
                f"{self.source.base_folder}."
            )
        self.class_names = self._read_names()
        files = self.source.train_list if train else self.source.test_list
        images, labels = zip(*(self._read_batch(self.folder / name) for name, _ in files), strict=True)
        return torch.from_numpy(np.concatenate(images)), torch.tensor(np.concatenate(labels))

    @batch_independent()
    def augmentation(self, images: Tensor) -> Tensor:
        """Pad each image by 4 pixels and crop at random; mirror half of them."""
        return random_horizontal_flip(random_crop(images, padding=4))

    def _differing(self) -> list[str]:
        """Return the names of the files that are missing, or not as they were published."""
        source = self.source
        sums = [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]
        return [name for name, md5 in sums if not check_integrity(self.folder / name, md5)]

    def _missing(self) -> list[str]:
        source = self.source
        names = [name for name, _ in source.train_list + source.test_list] + [source.meta["filename"]]
        return [name for name in names if not (self.folder / name).is_file()]

    def _read_names(self) -> tuple[str, ...]:
        path = self.folder / self.source.meta["filename"]
        names = require_key(path, load_pickle(path), self.source.meta["key"])
        if (
            not isinstance(names, list)
            or len(names) != self.num_classes
            or not all(isinstance(name, str) for name in names)
        ):
            raise ValueError(f"{path}: a list of {self.num_classes} names of classes is needed, found {names!r:.200}.")
        return tuple(names)

    def _read_batch(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Return a file's images, uint8 `(N, 3, 32, 32)`, and labels, int64 `(N,)`."""
        content = load_pickle(path)
        images, labels = pixel_rows(path, content), require_key(path, content, self.label_key)
        if not isinstance(labels, list) or len(labels) != len(images):
            found = f"{len(labels)} of them" if isinstance(labels, list) else type(labels).__name__
            raise ValueError(f"{path}: {self.label_key!r} must be a list of {len(images)} labels, found {found}.")
        for label in labels:
            if not isinstance(label, int) or not 0 <= label < self.num_classes:
                raise ValueError(
                    f"{path}: {self.label_key!r} must be whole numbers from 0 to {self.num_classes - 1}, "
                    f"found {label!r:.100}."
                )
        return images, np.array(labels, np.int64)


_CIFAR100_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


class CIFAR100DataModule(CIFAR10DataModule):
    """CIFAR-100: 50,000 training and 10,000 test images of 32x32 pixels in 100 classes (the fine labels).

    Reads `ROOT/cifar-100-python/{train, test, meta}`; all else, arguments too, is as in `CIFAR10DataModule`.
    """

    class_names = tuple(_CIFAR100_NAMES.split())
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
    source = CIFAR100
    label_key = "fine_labels"
