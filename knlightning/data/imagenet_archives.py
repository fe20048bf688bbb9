"""The official archives of ImageNet (ILSVRC 2012), unpacked into folders of classes.

Source: O. Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 2015. Names and MD5 sums are
those of torchvision's `ImageNet`. That is not used itself, since it begins anew after an interrupt, and unpacks
whatever paths an archive has.
"""

import hashlib
import io
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from knlightning.data.folder import abbreviated
from knlightning.data.image_cache import held
from knlightning.text import printable

NUM_CLASSES = 1000
VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
TRAIN_NAME = re.compile(r"n\d{8}_\d+\.JPEG")
CLASS_ARCHIVE = re.compile(r"(n\d{8})\.tar")
BLOCK = 2**20
"""Bytes that are read at once."""


@dataclass(frozen=True)
class Archive:
    """An official archive.

    Attributes:
        file: Its name.
        md5: Its MD5 sum.
        size: Its size in bytes; None if that is not checked.
        images: How many images it holds.
    """

    file: str
    md5: str
    size: int | None = None
    images: int = 0


ARCHIVES = {
    "train": Archive("ILSVRC2012_img_train.tar", "1d675b47d978889d74fa0da5fadfb00e", 147_897_477_120, 1_281_167),
    "val": Archive("ILSVRC2012_img_val.tar", "29b22e2961454d5413ddabcf34fc5622", 6_744_924_160, 50_000),
    "devkit": Archive("ILSVRC2012_devkit_t12.tar.gz", "fa75699e90414af021442c21a62c3abf"),
}
"""The archives of the training images, the validation images, and the labels of the latter."""


class _HashedFile:
    """A file that is read once, in order, and its MD5 sum."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.md5 = hashlib.md5(usedforsecurity=False)

    def read(self, size: int) -> bytes:
        block = self.file.read(size)
        self.md5.update(block)
        return block


def find_flat(folder: Path) -> list[str]:
    """List the validation images that lie in a folder itself, without folders of classes, sorted."""
    return sorted(filter(VAL_NAME.fullmatch, os.listdir(folder))) if folder.is_dir() else []


def read_val_classes(archives: Path) -> list[str]:
    """Read the class of each validation image from the devkit, of which nothing is unpacked.

    Args:
        archives: Folder in which it lies.

    Returns:
        WordNet ids, in the order of the images' numbers.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is damaged.
    """
    from scipy.io import loadmat  # here: slow to import

    path = archives / ARCHIVES["devkit"].file
    _check_file(path)
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != ARCHIVES["devkit"].md5:
        raise _damaged(path, "its MD5 sum is another")
    with tarfile.open(fileobj=io.BytesIO(content)) as devkit:

        def read(name: str) -> bytes:
            file = devkit.extractfile(f"ILSVRC2012_devkit_t12/data/{name}")
            assert file is not None
            return file.read()

        synsets = loadmat(io.BytesIO(read("meta.mat")), squeeze_me=True)["synsets"]
        numbers = read("ILSVRC2012_validation_ground_truth.txt").split()
    # synsets with children are groups of classes
    wnids = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if s["num_children"] == 0}
    return [wnids[int(number)] for number in numbers]


def unpack(split: str, archives: Path, root: Path, say: Callable[[str], None] = print) -> None:
    """Make the folder `ROOT/<split>/<wnid>/*.JPEG` of an official archive, or check the one that is there.

    Images are written into `ROOT/.<split>.partial` first; after an interrupt the same call goes on with those that are
    missing. The archive is read once, and its MD5 sum taken on the way. The folder gets its name when the sum and the
    number of images are right. Only regular files with the names that ImageNet has are written.

    Validation images that lie in `ROOT/val` without folders are moved into folders.

    Args:
        split: `train` or `val`.
        archives: Folder in which the archives lie.
        root: Folder to unpack into.
        say: Is told what was done.

    Raises:
        FileNotFoundError: If an archive that is needed is not there.
        OSError: If files cannot be written, or another process unpacks the same.
        ValueError: If an archive is damaged or another one, or the folder that is there is not complete.
    """
    folder, archive = root / split, ARCHIVES[split]
    if flat := find_flat(folder):
        _sort(folder, flat, read_val_classes(archives))
        say(f"{folder}: {len(flat)} images moved into the folders of their classes")
    elif not folder.exists():
        classes = read_val_classes(archives) if split == "val" else []
        with _partial(root / f".{split}.partial", archives / archive.file) as partial:
            _write_images(archives / archive.file, archive, partial, classes)
            _check_count(partial, archive)
            partial.rename(folder)
    _check_count(folder, archive)
    say(f"{folder}: {archive.images} images in {NUM_CLASSES} classes")


@contextmanager
def _partial(folder: Path, archive: Path) -> Iterator[Path]:
    """Hold the folder to unpack into; it is removed if the archive is found to be damaged."""
    _check_file(archive)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with held(folder):
            yield folder
    except BlockingIOError as error:
        raise BlockingIOError(f"{folder}: another process unpacks {archive.name}.") from error
    except (tarfile.TarError, ValueError) as error:
        shutil.rmtree(folder)
        raise error if isinstance(error, ValueError) else _damaged(archive, str(error)) from error


def _write_images(path: Path, archive: Archive, folder: Path, classes: Sequence[str]) -> None:
    """Write the images of an archive that are not written yet, and check its MD5 sum."""
    from rich.progress import open as open_with_progress

    size = path.stat().st_size
    if archive.size not in (None, size):
        raise _damaged(path, f"it has {size} bytes, and the official one {archive.size}")
    with open_with_progress(path, "rb", description=path.name) as file:
        hashed = _HashedFile(file)
        with tarfile.open(fileobj=hashed, mode="r|", bufsize=BLOCK) as outer:  # type: ignore[call-overload] # reads only
            for member in outer:
                if classes:
                    number = int(_match(VAL_NAME, member, path).group(1))
                    if not 1 <= number <= len(classes):
                        raise _damaged(path, f"image {number} has no label in {ARCHIVES['devkit'].file}")
                    _write(outer, member, folder / classes[number - 1])
                    continue
                wnid = _match(CLASS_ARCHIVE, member, path).group(1)
                with tarfile.open(fileobj=outer.extractfile(member), mode="r|") as inner:
                    for image in inner:
                        _match(TRAIN_NAME, image, path)
                        _write(inner, image, folder / wnid)
        while hashed.read(BLOCK):
            pass
    if hashed.md5.hexdigest() != archive.md5:
        raise _damaged(path, "its MD5 sum is another")


def _match(pattern: re.Pattern[str], member: tarfile.TarInfo, path: Path) -> re.Match[str]:
    match = pattern.fullmatch(member.name)
    if match is None or not member.isreg():
        raise _damaged(path, f"it holds {printable(member.name)}, which is none of the files of ImageNet")
    return match


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Write a file, so that one of its name is always whole; not if it is there."""
    target = folder / member.name
    if target.is_file() and target.stat().st_size == member.size:
        return
    folder.mkdir(exist_ok=True)
    content: Any = archive.extractfile(member)
    unfinished = folder / f".{member.name}"
    with unfinished.open("wb") as file:
        shutil.copyfileobj(content, file, BLOCK)
    unfinished.replace(target)


def _sort(folder: Path, names: Sequence[str], classes: Sequence[str]) -> None:
    """Move validation images into folders of their classes; an interrupt leaves some, which the next call moves."""
    for name in names:
        wnid = classes[int(name.split("_")[-1].removesuffix(".JPEG")) - 1]
        (folder / wnid).mkdir(exist_ok=True)
        (folder / name).rename(folder / wnid / name)


def _check_file(archive: Path) -> None:
    if not archive.is_file():
        raise FileNotFoundError(f"There is no file {archive.absolute()}. It comes from image-net.org (registration).")


def _check_count(folder: Path, archive: Archive) -> None:
    """Check how many classes and images a folder has."""
    counts = {entry.name: len(os.listdir(entry)) for entry in os.scandir(folder) if entry.is_dir()}
    images = sum(counts.values())
    if (len(counts), images) != (NUM_CLASSES, archive.images):
        raise ValueError(
            f"{folder.absolute()}: {images} files in {len(counts)} folders ({abbreviated(sorted(counts))}); ImageNet "
            f"has {archive.images} in {NUM_CLASSES}. Remove the folder, and it is unpacked from {archive.file} again."
        )


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path.absolute()}: not the official archive, or damaged ({reason}). Download it again.")
