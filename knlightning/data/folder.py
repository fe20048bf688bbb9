"""A user's own images, to predict on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as tv


class FolderImages(Dataset[tuple[Tensor, str]]):
    """All images in a folder and its subfolders, in the order of their paths.

    Files are told by their suffix (`torchvision.datasets.folder.IMG_EXTENSIONS`); those whose name begins with a dot
    are left out. An image is turned as its EXIF data say, made RGB (transparency is dropped), scaled until it covers
    the target with its aspect ratio kept, and cropped around its centre to the target. Nothing else is done to it:
    for a network trained on light strokes on a dark ground, such as the digits, invert scans of dark ink first.

    Args:
        root: The folder.
        size: `(height, width)` of the images to give.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: It holds no image, or a file with an image's suffix that is none; the message names it. When the
            object is made, the heads of all files are looked at, and the checksums of formats that have them; other
            damage shows, by the same error, when the image is read.
    """

    def __init__(self, root: str | os.PathLike[str], size: tuple[int, int]) -> None:
        folder = Path(root)
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder.absolute()} with images to predict on.")
        self.size = size
        self.paths = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".") and path.is_file()
        )
        if not self.paths:
            raise ValueError(
                f"There are no images in {folder.absolute()} or its subfolders. Files are known by their suffix: "
                f"{' '.join(IMG_EXTENSIONS)}."
            )
        for path in self.paths:
            with _opened(path) as image:
                image.verify()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        """Return an image, uint8 `(3, height, width)`, and its path."""
        path = self.paths[index]
        height, width = self.size
        with _opened(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            fitted = ImageOps.fit(upright, (width, height), Image.Resampling.BILINEAR)
        return tv.pil_to_tensor(fitted), str(path)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image, and say in one way which file cannot be read."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError("pixels of more than 8 bits; save it with 8 bits a channel")
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all raised by decoders
        raise ValueError(f"{path}: cannot be read as an image ({error}). Mend it or take it out.") from error


def collate_named(samples: list[tuple[Tensor, str]]) -> tuple[Tensor, list[str]]:
    """Make a batch: uint8 `(N, 3, height, width)`, and the paths."""
    images, paths = zip(*samples, strict=True)
    return torch.stack(images), list(paths)
