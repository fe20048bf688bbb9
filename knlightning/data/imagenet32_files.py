"""Files of ImageNet at 32x32 pixels: npz files, pickles, or folders of images, and the map of its classes."""

import math
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from knlightning.data.decoding import decoded
from knlightning.data.folder import find_classes, find_images_in
from knlightning.data.imagenet_archives import NUM_CLASSES
from knlightning.data.unpickling import load_pickle, pixel_rows, require_key

IMAGES_PER_BLOCK = 4096
MOST_BYTES = 2**31
"""Most bytes of an array in a file; the largest of the data set has a fifth of it."""
CLASS_MAP = "map_clsloc.txt"


def find_sources(root: Path, train: bool) -> list[Path]:
    """Return the files of a split, or the one folder that holds its folders of classes; an empty list for neither.

    Args:
        root: Folder in which the data lie.
        train: Whether to look for the training or for the validation images.

    Raises:
        FileNotFoundError: If some of the files are missing.
    """
    names = [f"train_data_batch_{number}" for number in range(1, 11)] if train else ["val_data"]
    split = "train" if train else "val"
    for folder, suffix in ((f"Imagenet32_{split}_npz", ".npz"), ("", ".npz"), ("", "")):
        files = [root / folder / f"{name}{suffix}" for name in names]
        missing = [file.name for file in files if not file.is_file()]
        if not missing:
            return files
        if len(missing) < len(files):
            raise FileNotFoundError(
                f"{', '.join(missing)} missing in {files[0].parent.absolute()}, where others of the "
                f"{len(files)} files are."
            )
    folders = root / split
    return [folders] if folders.is_dir() else []


def read_class_map(root: Path) -> dict[str, str]:
    """Return the names of the classes by WordNet id, in the devkit's order; an empty dict if there is no file.

    Args:
        root: Folder in which `map_clsloc.txt` lies.

    Raises:
        ValueError: If the file is damaged.
    """
    path = root / CLASS_MAP
    if not path.is_file():
        return {}
    lines = []
    for number, line in enumerate(path.read_text("utf-8", errors="backslashreplace").splitlines(), 1):
        match line.split(maxsplit=2):
            case [wnid, place, name] if place.isdecimal():
                lines.append((int(place), wnid, name))
            case _:
                raise ValueError(f"{path}, line {number}: must be 'wnid number name', found {line!r:.100}.")
    lines.sort()
    wnids = {wnid for _, wnid, _ in lines}
    if [place for place, _, _ in lines] != list(range(1, NUM_CLASSES + 1)) or len(wnids) != NUM_CLASSES:
        raise ValueError(f"{path}: {NUM_CLASSES} classes numbered from 1 are needed, each once.")
    return {wnid: name for _, wnid, name in lines}


def read_blocks(sources: list[Path]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the images, uint8 `(n, 3, 32, 32)`, and labels from 0, `(n,)`, block by block.

    Args:
        sources: What `find_sources` returned.

    Raises:
        ValueError: If a file is damaged or of another format, or there are not 1000 folders with images.
    """
    if not sources[0].is_dir():
        yield from map(_read_file, sources)
        return
    classes = find_classes(sources[0])
    if len(classes) != NUM_CLASSES:
        raise ValueError(f"{sources[0].absolute()}: {NUM_CLASSES} folders of classes are needed, found {len(classes)}.")
    for label, (name, paths) in enumerate(zip(classes, find_images_in(sources[0], classes), strict=True)):
        if not paths:
            raise ValueError(f"{sources[0].absolute()}: no images in the folder {name}.")
        for start in range(0, len(paths), IMAGES_PER_BLOCK):
            images = np.stack([_read_image(path) for path in paths[start : start + IMAGES_PER_BLOCK]])
            yield images, np.full(len(images), label)


def _read_image(path: str) -> np.ndarray:
    image = decoded(path, upright=False)
    if image.size != (32, 32):
        raise ValueError(f"{path}: must have 32x32 pixels, found {image.width}x{image.height}.")
    return np.asarray(image).transpose(2, 0, 1)


def _read_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return a file's images, uint8 `(N, 3, 32, 32)`, and labels from 0."""
    content = _read_npz(path) if path.suffix == ".npz" else load_pickle(path)
    images, labels = pixel_rows(path, content), require_key(path, content, "labels")
    plain = isinstance(labels, list) and all(isinstance(label, int) for label in labels)
    numbers = np.asarray(labels) if plain or isinstance(labels, np.ndarray) else np.empty(0)
    if numbers.dtype.kind not in "iu" or numbers.shape != (len(images),):
        raise ValueError(
            f"{path}: 'labels' must be {len(images)} whole numbers, found {numbers.dtype} of shape {numbers.shape}."
        )
    if len(numbers) and not 1 <= numbers.min() <= numbers.max() <= NUM_CLASSES:
        raise ValueError(f"{path}: 'labels' must be 1 to {NUM_CLASSES}, found {numbers.min()} to {numbers.max()}.")
    return images, numbers - 1


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an npz file by their names; of others than `data` and `labels` nothing but the name.

    Raises:
        ValueError: If the file is damaged, or an array is larger than those of the dataset; the message names the file.
        OSError: If the file cannot be opened.
    """
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                content = {name.removesuffix(".npy"): np.empty(0) for name in archive.namelist()}
                for name in content.keys() & {"data", "labels"}:
                    content[name] = _read_array(archive, f"{name}.npy")
                return content
        except Exception as error:  # a damaged file may raise nearly anything
            raise ValueError(
                f"{path}: no npz file of plain arrays ({str(error) or type(error).__name__}). It is damaged or not "
                "what it should be; get it again."
            ) from error


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Read an array, after its size is known to be what the file holds, and not too large."""
    size = archive.getinfo(name).file_size
    if size > MOST_BYTES:
        raise ValueError(f"{name} has {size} bytes, at most {MOST_BYTES} are read")
    with archive.open(name) as file:
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        version = np.lib.format.read_magic(file)
        if version not in readers:
            raise ValueError(f"{name} is of version {version} of numpy's format")
        shape, _, dtype = readers[version](file)
        if dtype.hasobject or math.prod(shape) * dtype.itemsize > size:
            raise ValueError(f"{name} cannot be {dtype} of shape {shape}")
    with archive.open(name) as file:
        array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    return array
