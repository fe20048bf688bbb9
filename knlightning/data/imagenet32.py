"""ImageNet at 32x32 pixels, from npz files, pickles or folders.

Source: P. Chrabaszcz, I. Loshchilov, F. Hutter, A Downsampled Variant of ImageNet as an Alternative to the CIFAR
datasets, arXiv:1707.08819.
"""

import hashlib
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from knlightning.data.base import ImageDataModule, Scaling, TensorImages
from knlightning.data.folder import decoded, find_classes, find_images, listed
from knlightning.data.image_folder import IMAGENET_MEAN, IMAGENET_STD
from knlightning.data.imagenet import NUM_CLASSES
from knlightning.data.transforms import random_crop, random_horizontal_flip
from knlightning.data.unpickling import entry, load_pickle

RECORD = np.dtype([("image", np.uint8, (3, 32, 32)), ("label", "<u2")])
"""One image in the cache, with its label from 0."""
BLOCK = 4096
CLASS_MAP = "map_clsloc.txt"


class MappedImages(TensorImages):
    """Images in a cache file that is mapped into memory, where all processes that read it share them.

    Args:
        path: A .npy file of `RECORD`s.
        labels: int64 `(N,)`.
    """

    def __init__(self, path: Path, labels: Tensor) -> None:
        super().__init__(torch.from_numpy(mapped(path)["image"]), labels)
        self.path = path

    def __getstate__(self) -> dict[str, Any]:
        """Leave the images out: a process that is not forked would be given a copy of them; it maps the file itself."""
        return {key: value for key, value in vars(self).items() if key != "images"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, images=torch.from_numpy(mapped(state["path"])["image"]))


def mapped(path: Path) -> np.ndarray:
    """Map a cache file into memory.

    Returns:
        `RECORD`s `(N,)`; what is written to them stays in this process.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        records = np.load(path, mmap_mode="c", allow_pickle=False)
        if records.dtype != RECORD or records.ndim != 1:
            raise ValueError(f"{records.dtype} of shape {records.shape}")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: a damaged cache ({error}). Delete it; it is made anew from the data.") from error
    return records


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
    as torchvision does it (the tench is number 0), unless a file `ROOT/map_clsloc.txt` is there, with lines
    `wnid number name` and numbers from 1: then they are in the devkit's order too. A network trained with one order is
    of no use with the other. The file also gives the names of the classes; without it they are called "class 1" to
    "class 1000", and after their folders.

    The images take 3.9 GB. When they are read for the first time they are written into one file,
    `imagenet32-{train,val}-<digest of the sources' names, sizes and times>.npy`, which all processes on a machine
    then map into their memory and share. It may be deleted when nothing runs.

    Args:
        root: Folder in which the data lie.
        cache_dir: Folder of that file; None for `root`. Best on a local disk.
        batch_size: Training images in a batch, on each device; for this and what follows see `ImageDataModule` too.
        eval_batch_size: The same for validation, test and prediction; None for `batch_size`.
        scaling: `unit` (pixels / 255) or `standard` (less ImageNet's mean, divided by its standard deviation too).
        augment: Whether training images are padded by 4 pixels, cropped at random and mirrored with probability 1/2.
        val_split: Fraction of the training images held out for validation; with 0 the test images serve for it.
        split_seed: Seed of that split.
        num_workers: Processes that read the files in `predict_dir`; images in memory need none.
        pin_memory: Whether batches are put into page-locked memory; None if training on a CUDA device.
        predict_dir: Folder of images to predict on.

    Raises:
        ValueError: An argument is out of range.
    """

    class_names: tuple[str, ...] = tuple(f"class {number}" for number in range(1, NUM_CLASSES + 1))
    mean = IMAGENET_MEAN
    std = IMAGENET_STD
    image_size = (32, 32)

    def __init__(
        self,
        root: str | os.PathLike[str] = "data",
        cache_dir: str | os.PathLike[str] | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        scaling: Scaling = "unit",
        augment: bool = False,
        val_split: float = 0.0,
        split_seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        predict_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            scaling=scaling,
            augment=augment,
            val_split=val_split,
            split_seed=split_seed,
            num_workers=num_workers,
            pin_memory=pin_memory,
            predict_dir=predict_dir,
        )
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
            FileNotFoundError: Files are missing; says which, and where.
            ValueError: A file is damaged or of another format; says which, and what was found.
        """
        records = mapped(self._cache(train))
        labels = torch.from_numpy(records["label"].astype(np.int64))
        folders, others = self._folders(train), self._folders(not train)
        if class_map := self._class_map():
            if unknown := [name for name in folders or [] if name not in class_map]:
                raise ValueError(f"{self.root / CLASS_MAP}: does not have the folders {listed(unknown)}.")
            if folders:
                place = {wnid: number for number, wnid in enumerate(class_map)}
                labels = torch.tensor([place[wnid] for wnid in folders])[labels]
            self.class_names = distinct(list(class_map.values()))
        elif others not in (None, folders):
            raise ValueError(
                f"{self.root.absolute()}: the classes of the training and of the validation images are numbered in "
                f"different orders, by files and by folders or by folders of other names. A file {CLASS_MAP} there "
                "would settle the order of files and of folders named by WordNet ids."
            )
        elif folders:
            self.class_names = tuple(folders)
        return torch.from_numpy(records["image"]), labels

    def augmentation(self, images: Tensor) -> Tensor:
        """Pad each image by 4 pixels and crop at random; mirror half of them."""
        return random_horizontal_flip(random_crop(images, padding=4))

    def _load(self, source: str) -> TensorImages:
        return MappedImages(self._cache(source == self._train), super()._load(source).labels)

    def _folders(self, train: bool) -> list[str] | None:
        """Return the names of the folders of classes; an empty list for files, None if there is neither."""
        sources = self._sources(train)
        return None if not sources else find_classes(sources[0]) if sources[0].is_dir() else []

    def _sources(self, train: bool) -> list[Path]:
        """Return the files of a part, or the one folder of its folders; nothing if there are neither."""
        names = [f"train_data_batch_{number}" for number in range(1, 11)] if train else ["val_data"]
        part = "train" if train else "val"
        for folder, suffix in ((f"Imagenet32_{part}_npz", ".npz"), ("", ".npz"), ("", "")):
            files = [self.root / folder / f"{name}{suffix}" for name in names]
            missing = [file.name for file in files if not file.is_file()]
            if not missing:
                return files
            if len(missing) < len(files):
                raise FileNotFoundError(
                    f"{', '.join(missing)} missing in {files[0].parent.absolute()}, where others of the "
                    f"{len(files)} files are."
                )
        folders = self.root / part
        return [folders] if folders.is_dir() else []

    def _cache(self, train: bool) -> Path:
        """Return the cache of a part, after writing it if there is none that fits the sources."""
        part = "train" if train else "val"
        sources = self._sources(train)
        if not sources:
            raise FileNotFoundError(
                f"There are no {part} images of ImageNet 32x32 in {self.root.absolute()}: looked for "
                f"Imagenet32_{part}_npz/*.npz, for {'train_data_batch_1 to 10' if train else 'val_data'}, and for "
                f"{part}/CLASS/*. Give the folder that holds them with --data.root."
            )
        # a folder's time changes with the files in it
        stamped = sorted(sources[0].iterdir()) if sources[0].is_dir() else sources
        stamps = [(p.name, p.is_file() and p.stat().st_size, p.stat().st_mtime_ns) for p in stamped]
        digest = hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]
        path = self.cache_dir / f"imagenet32-{part}-{digest}.npy"
        if not path.is_file():
            rank_zero_info(f"Writing the {part} images of ImageNet 32x32 into {path}; this is done once.")
            write_records(path, _blocks(sources))
        return path

    def _class_map(self) -> dict[str, str]:
        """Return the names of the classes by WordNet id, in the devkit's order; nothing if there is no file."""
        path = self.root / CLASS_MAP
        if not path.is_file():
            return {}
        entries = []
        for number, line in enumerate(path.read_text().splitlines(), 1):
            match line.split(maxsplit=2):
                case [wnid, place, name] if place.isdecimal():
                    entries.append((int(place), wnid, name))
                case _:
                    raise ValueError(f"{path}, line {number}: must be 'wnid number name', found {line!r:.100}.")
        entries.sort()
        if [place for place, _, _ in entries] != list(range(1, NUM_CLASSES + 1)) or len(
            {wnid for _, wnid, _ in entries}
        ) != NUM_CLASSES:
            raise ValueError(f"{path}: {NUM_CLASSES} classes numbered from 1 are needed, each once.")
        return {wnid: name for _, wnid, name in entries}


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Number names that occur again: the devkit calls two classes crane, for example."""
    return tuple(
        f"{name} ({names[:place].count(name) + 1})" if name in names[:place] else name
        for place, name in enumerate(names)
    )


def write_records(path: Path, blocks: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
    """Write a cache file at one stroke, so that no process ever sees a part of it.

    Args:
        path: The file.
        blocks: Images, uint8 `(n, 3, 32, 32)`, and labels from 0, `(n,)`.

    Raises:
        OSError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # a folder of this process's own: another one may be writing the same cache
        with tempfile.TemporaryDirectory(prefix=".imagenet32-", dir=path.parent) as folder:
            unfinished = Path(folder) / path.name
            with unfinished.open("wb") as file:
                count = 0
                _write_header(file, count)
                for images, labels in blocks:
                    records = np.empty(len(images), RECORD)
                    records["image"], records["label"] = images, labels
                    file.write(records.tobytes())
                    count += len(images)
                file.seek(0)
                _write_header(file, count)  # numpy leaves room in it for the number to grow
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
    except OSError as error:
        raise OSError(
            f"{path}: the images cannot be written ({error}). Give a folder with 4 GB of space by --data.cache_dir."
        ) from error


def _write_header(file: Any, count: int) -> None:
    descr = np.lib.format.dtype_to_descr(RECORD)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (count,)})


def _blocks(sources: list[Path]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the images and labels of the sources, as `write_records` takes them."""
    if not sources[0].is_dir():
        yield from map(_read_file, sources)
        return
    classes = find_classes(sources[0])
    if len(classes) != NUM_CLASSES:
        raise ValueError(f"{sources[0].absolute()}: {NUM_CLASSES} folders of classes are needed, found {len(classes)}.")
    for label, name in enumerate(classes):
        paths = find_images(sources[0] / name)
        if not paths:
            raise ValueError(f"{sources[0].absolute()}: no images in the folder {name}.")
        for start in range(0, len(paths), BLOCK):
            images = np.stack([_read_image(path) for path in paths[start : start + BLOCK]])
            yield images, np.full(len(images), label)


def _read_image(path: str) -> np.ndarray:
    image = decoded(path, upright=False)
    if image.size != (32, 32):
        raise ValueError(f"{path}: must have 32x32 pixels, found {image.width}x{image.height}.")
    return np.asarray(image).transpose(2, 0, 1)


def _read_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return a file's images, uint8 `(N, 3, 32, 32)`, and labels from 0."""
    content = _read_npz(path) if path.suffix == ".npz" else load_pickle(path)
    data, labels = entry(path, content, "data"), entry(path, content, "labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        found = f"{data.dtype} of shape {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise ValueError(f"{path}: 'data' must be uint8 of shape (N, 3072), found {found}.")
    plain = isinstance(labels, list) and all(isinstance(label, int) for label in labels)
    numbers = np.asarray(labels) if plain or isinstance(labels, np.ndarray) else np.empty(0)
    if numbers.dtype.kind not in "iu" or numbers.shape != (len(data),):
        raise ValueError(
            f"{path}: 'labels' must be {len(data)} whole numbers, found {numbers.dtype} of shape {numbers.shape}."
        )
    if len(numbers) and not 1 <= numbers.min() <= numbers.max() <= NUM_CLASSES:
        raise ValueError(f"{path}: 'labels' must be 1 to {NUM_CLASSES}, found {numbers.min()} to {numbers.max()}.")
    return data.reshape(-1, 3, 32, 32), numbers - 1


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path):  # np.load takes other formats too
            pass
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in ("data", "labels") if key in file}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: no npz file of plain arrays ({error}). It is damaged or not what it should be; get it again."
        ) from error
