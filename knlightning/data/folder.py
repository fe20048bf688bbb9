"""Folders of image files: how images are found and decoded, and a dataset of a user's own images to predict on."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tv

from knlightning.internals.torchvision import IMG_EXTENSIONS

MAX_NAMES = 5
"""Number of files or classes that a message names."""


def abbreviated(names: Sequence[str]) -> str:
    """Join the first names of a list, and tell how many more there are."""
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def find_images(folder: str | os.PathLike[str]) -> list[str]:
    """List the image files in a folder and its subfolders, sorted.

    A file is an image file if it has one of the suffixes `IMG_EXTENSIONS`, and its name does not begin with a dot.

    Args:
        folder: The folder, or a link to it; links to folders in it are not followed.

    Returns:
        Paths that begin with `folder`.
    """
    return sorted(
        os.path.join(where, name)
        for where, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
    )


def find_classes(folder: Path) -> list[str]:
    """List the folders of classes in a folder, sorted by name; those whose name begins with a dot are left out.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If there are no folders in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder.absolute()}. Images are looked for in ROOT/train/CLASS and ROOT/val/CLASS; "
            "give another root, or other names of folders."
        )
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(f"There are no folders in {folder.absolute()}: the images of each class need a folder.")
    return classes


def decoded(path: str | os.PathLike[str], upright: bool = True) -> Image.Image:
    """Decode an image file to RGB; transparency is dropped.

    Args:
        path: The file.
        upright: Whether to turn the image as its EXIF data say.

    Raises:
        ValueError: If the file cannot be decoded, or its pixels have more than 8 bits a channel; the message names it.
    """
    with opened(path) as image:
        return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")


def fitted(image: Image.Image, size: tuple[int, int], resize: int | None) -> Tensor:
    """Bring an image to a size, with its aspect ratio kept, by cutting out its centre.

    Args:
        image: The image.
        size: `(height, width)` to give.
        resize: Length to which the shorter side is scaled first; None scales the image until it covers the target.

    Returns:
        uint8 `(3, height, width)`.
    """
    if resize is None:
        height, width = size
        return tv.pil_to_tensor(ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR))
    return tv.pil_to_tensor(tv.center_crop(tv.resize(image, [resize]), list(size)))


class FolderImages(Dataset[tuple[Tensor, str]]):
    """All images in a folder and its subfolders (`find_images`), in the order of their paths.

    An image is turned as its EXIF data say, converted to RGB, and brought to a size by `fitted`, or left at its own.
    Nothing else is done to it: for a network trained on light strokes on a dark background, such as the digits, invert
    scans of dark ink first.

    Args:
        root: The folder.
        size: `(height, width)` of the images to give; None for their own.
        resize: Length to which the shorter side is scaled before the centre is cut out; None for the least that
            covers `size`.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If it holds no image, or a file with the suffix of an image that is none; the message names it. When
            the object is made, the headers of all files are checked, and the checksums of formats that have them; other
            damage raises the same error when the image is read.
    """

    def __init__(self, root: str | os.PathLike[str], size: tuple[int, int] | None, resize: int | None = None) -> None:
        folder = Path(root)
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder.absolute()} with images to predict on.")
        self.size, self.resize = size, resize
        self.paths = find_images(folder)
        if not self.paths:
            raise ValueError(
                f"There are no images in {folder.absolute()} or its subfolders. Image files have one of the suffixes "
                f"{' '.join(IMG_EXTENSIONS)}."
            )
        for path in self.paths:
            with opened(path) as image:
                image.verify()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        """Return an image, uint8 `(3, height, width)`, and its path."""
        path = self.paths[index]
        image = decoded(path)
        return tv.pil_to_tensor(image) if self.size is None else fitted(image, self.size, self.resize), path

    @staticmethod
    def collate(samples: list[tuple[Tensor, str]]) -> tuple[Tensor, list[str]]:
        """Make a batch: uint8 `(N, 3, height, width)`, and the paths."""
        images, paths = zip(*samples, strict=True)
        return torch.stack(images), list(paths)


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Open an image for the time of the block; errors of all decoders become one, which names the file.

    Args:
        path: The file.

    Raises:
        ValueError: If the block raises the error of a decoder, or the pixels have more than 8 bits a channel; the
            message names the file.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError("pixels of more than 8 bits; save it with 8 bits a channel")
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all raised by decoders
        raise ValueError(f"{path}: cannot be read as an image ({error}). Mend it or take it out.") from error
