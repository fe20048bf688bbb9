"""Folders of image files: how images are found, and a dataset of a user's own images to predict on."""

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tv

from knlightning.data.decoding import UnreadableImageError, decoded, fitted, opened, unreadable
from knlightning.internals.torchvision import IMG_EXTENSIONS
from knlightning.text import printable

MAX_NAMES = 5
"""Number of files or classes that a message names."""
EMPTY_SIZE = (64, 64)
"""Height and width of the images in a batch of none."""


def abbreviated(names: Sequence[str], count: int | None = None) -> str:
    """Join the first names of a list, in a form that can be printed, and tell how many more there are.

    Args:
        names: The names.
        count: How many there are, if not all of them are given.
    """
    more = (len(names) if count is None else count) - MAX_NAMES
    return ", ".join(map(printable, names[:MAX_NAMES])) + (f" and {more} more" if more > 0 else "")


def is_hidden(name: str) -> bool:
    """Say whether a file or a folder is left out: if its name begins with a dot."""
    return name.startswith(".")


def find_images(folder: str | os.PathLike[str]) -> list[str]:
    """List the image files in a folder and its subfolders, sorted; see `find_images_in`.

    Args:
        folder: The folder, or a link to it.

    Returns:
        Paths that begin with `folder`.
    """
    return find_images_in(folder, [""])[0]


def find_images_in(root: str | os.PathLike[str], folders: Sequence[str]) -> list[list[str]]:
    """List the image files in each of some folders and their subfolders, sorted.

    A file is an image file if it has one of the suffixes `IMG_EXTENSIONS`. Hidden files and folders, whose names begin
    with a dot, are left out. Links to folders are followed, and a subfolder that is reached in several ways counts
    once. How many were left out and followed is said.

    Args:
        root: Folder in which the folders lie, or a link to it.
        folders: Their names; an empty one for `root` itself.

    Returns:
        Paths of each folder, which begin with `root`.

    Raises:
        OSError: If a folder cannot be read; the message names it.
    """
    hidden: list[str] = []
    linked: list[str] = []
    found = []
    for folder in folders:
        path = os.path.join(root, folder) if folder else os.fspath(root)
        linked += [path] if folder and os.path.islink(path) else []
        found.append(_walk(path, hidden, linked))
    for paths, what in ((hidden, "hidden files or folders left out"), (linked, "links to folders followed")):
        if paths:
            names = abbreviated([os.path.relpath(path, root) for path in paths])
            rank_zero_info(f"{printable(os.fspath(root))}: {len(paths)} {what} ({names}).")
    return found


def _walk(top: str, hidden: list[str], linked: list[str]) -> list[str]:
    """List the image files below a folder, and add the paths of what is hidden and of what is a link to lists."""
    images: list[str] = []
    known: set[tuple[int, int]] = set()
    starts = [top]  # grows while links are found; they come last, so that a folder keeps its own path if it has one
    for start in starts:
        for where, subfolders, names in os.walk(start, onerror=_refuse):
            status = os.stat(where)
            if (status.st_dev, status.st_ino) in known:
                subfolders.clear()
                continue
            known.add((status.st_dev, status.st_ino))
            links = [name for name in sorted(subfolders) if os.path.islink(os.path.join(where, name))]
            hidden += [os.path.join(where, name) for name in subfolders if is_hidden(name)]
            new = [os.path.join(where, name) for name in links if not is_hidden(name)]
            linked += new
            starts += new
            subfolders[:] = [name for name in subfolders if not is_hidden(name) and name not in links]
            paths = [(name, os.path.join(where, name)) for name in names if name.lower().endswith(IMG_EXTENSIONS)]
            hidden += [path for name, path in paths if is_hidden(name)]
            images += [path for name, path in paths if not is_hidden(name)]
    return sorted(images)


def _refuse(error: OSError) -> NoReturn:
    raise OSError(
        f"{printable(str(error.filename))}: the folder cannot be read ({error.strerror}). Give it the rights, or "
        "take it out."
    ) from error


def find_classes(folder: Path) -> list[str]:
    """List the folders of classes in a folder, sorted by name; hidden ones are left out, and links are followed.

    Raises:
        FileNotFoundError: If the folder does not exist.
        OSError: If it cannot be read.
        ValueError: If there are no folders in it.
    """
    if not folder.is_dir():
        missing = folder if folder.parent.is_dir() else folder.parent
        raise FileNotFoundError(
            f"There is no folder {missing.absolute()}. Images are looked for in ROOT/train/CLASS and ROOT/val/CLASS; "
            "give another root, or other names of folders. With val_split above 0 there need be no folder val, and "
            "classes may lie in ROOT/CLASS."
        )
    classes = list_folders(folder)
    if hidden := [name for name in classes if is_hidden(name)]:
        rank_zero_info(f"{folder}: {len(hidden)} hidden folders left out ({abbreviated(hidden)}).")
    classes = [name for name in classes if not is_hidden(name)]
    if not classes:
        raise ValueError(f"There are no folders in {folder.absolute()}: the images of each class need a folder.")
    return classes


def list_folders(folder: Path) -> list[str]:
    """List the folders in a folder, sorted by name, links to folders and hidden ones too.

    Raises:
        OSError: If it cannot be read; the message names it.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    except OSError as error:
        _refuse(error)


def warn_of_damaged(damaged: Tensor, reported: int, path: Callable[[int], str], what: str) -> int:
    """Warn of damaged files, if there are more than were reported.

    Args:
        damaged: bool `(N,)`, which files are damaged.
        reported: How many of them have been reported.
        path: Returns the path of a file by its index.
        what: What happened to them.

    Returns:
        Their number.
    """
    found = damaged.nonzero()[:, 0].tolist()
    if len(found) > reported:
        names = abbreviated([path(index) for index in found[:MAX_NAMES]], len(found))
        warnings.warn(f"{len(found)} of the {len(damaged)} images {what}: {names}.", stacklevel=3)
    return len(found)


class FolderImages(Dataset[tuple[Tensor, str] | None]):
    """All images in a folder and its subfolders (`find_images`), in the order of their paths; or a single image.

    Of an animation, and of a file with several pages, the first image counts. An image is turned as its EXIF data say,
    converted to RGB, and brought to a size by `fitted`, or left at its own. Nothing else is done to it: for a network
    trained on light strokes on a dark background, such as the digits, invert scans of dark ink first.

    Args:
        root: The folder, or the file of a single image.
        size: `(height, width)` of the images to give; None for their own.
        resize: Length to which the shorter side is scaled before the centre is cut out; None for the least that
            covers `size`.
        skip_damaged: Whether a file that cannot be read is left out, and told with the reason by `report`. If not, it
            is an error.

    Attributes:
        damaged: bool `(N,)`, which files could not be read so far; shared by all processes that read.

    Raises:
        FileNotFoundError: If there is no such folder or file.
        ValueError: If it holds no image, or a file with the suffix of an image that is none; the message names it. When
            the object is made, the headers of all files are checked, and the checksums of formats that have them; other
            damage raises the same error when the image is read.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        size: tuple[int, int] | None,
        resize: int | None = None,
        skip_damaged: bool = False,
    ) -> None:
        folder = Path(root)
        if not folder.exists():
            raise FileNotFoundError(f"There is no folder, and no image, {folder.absolute()} to predict on.")
        self.size, self.resize, self.skip_damaged = size, resize, skip_damaged
        self.paths = find_images(folder) if folder.is_dir() else [os.fspath(root)]
        if not self.paths:
            raise ValueError(
                f"There are no images in {folder.absolute()} or its subfolders. Image files have one of the suffixes "
                f"{' '.join(IMG_EXTENSIONS)}."
            )
        self.damaged = torch.zeros(len(self.paths), dtype=torch.bool).share_memory_()
        self._reported = 0
        for number, path in enumerate(self.paths):
            try:
                with opened(path) as image:
                    image.verify()
            except UnreadableImageError:
                if not skip_damaged:
                    raise
                self.damaged[number] = True
        if self.damaged.all():
            raise ValueError(f"{folder.absolute()}: none of the {len(self)} images can be read.")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, str] | None:
        """Return an image, uint8 `(3, height, width)`, and its path; None for a damaged one that is skipped."""
        path = self.paths[index]
        if self.damaged[index]:
            return None
        try:
            return self._read(path), path
        except UnreadableImageError:
            if not self.skip_damaged:
                raise
            self.damaged[index] = True
            return None

    def _read(self, path: str) -> Tensor:
        image = decoded(path)
        try:
            return tv.pil_to_tensor(image) if self.size is None else fitted(image, self.size, self.resize)
        except MemoryError as error:
            raise unreadable(path, error) from error

    @staticmethod
    def collate(samples: Sequence[tuple[Tensor, str] | None]) -> tuple[Tensor, list[str]]:
        """Make a batch: uint8 `(N, 3, height, width)`, and the paths."""
        read = [sample for sample in samples if sample is not None]
        return torch.stack([image for image, _ in read]) if read else torch.empty(0), [path for _, path in read]

    def empty_batch(self) -> tuple[Tensor, list[str]]:
        """Return a batch of no images, for a process that has none to predict on."""
        height, width = self.size or EMPTY_SIZE
        return torch.empty(0, 3, height, width, dtype=torch.uint8), []

    def report(self) -> None:
        """Warn of damaged files, if more were met since the last report."""
        self._reported = warn_of_damaged(
            self.damaged, self._reported, self._damage, "could not be read, and have no prediction"
        )

    def _damage(self, index: int) -> str:
        """Say what is wrong with a file. It is read once more: it was another process that knew the reason."""
        try:
            with opened(self.paths[index]) as image:
                image.verify()
            self._read(self.paths[index])
        except UnreadableImageError as error:
            return str(error)
        return self.paths[index]
