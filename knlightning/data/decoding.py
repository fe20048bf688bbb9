"""Image files from anywhere: opened with care, decoded to RGB, and brought to a size."""

import io
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from PIL import ExifTags, Image, ImageOps
from simplejpeg import decode_jpeg, decode_jpeg_header
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from knlightning.text import printable

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
"""Formats that are read, whatever the suffix of a file says. Pillow knows more, and starts other programs for some."""
MAX_PIXELS = 178_956_970
"""Most pixels of an image. It is the number above which Pillow takes a file for an attack."""
MOST_ELONGATED = 100
"""A strip that is longer in relation to its width is cut before it is scaled."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its orientation in EXIF data."""


class UnreadableImageError(ValueError):
    """A file cannot be used as an image; the message names it."""


def unreadable(path: str | os.PathLike[str], error: Exception) -> UnreadableImageError:
    """Make the error of a file that cannot be used as an image.

    Args:
        path: The file.
        error: What a decoder raised, or MemoryError.
    """
    reason = (
        f"it is in none of the formats {', '.join(FORMATS)}"
        if type(error).__name__ == "UnidentifiedImageError"
        else "there is not enough memory for it"
        if isinstance(error, MemoryError)
        else printable(str(error)) or type(error).__name__
    )
    return UnreadableImageError(
        f"{printable(os.fspath(path))}: cannot be read as an image ({reason}). Mend it or take it out."
    )


@contextmanager
def opened(path: str | os.PathLike[str], content: bytes | None = None) -> Iterator[Image.Image]:
    """Open an image for the time of the block; errors of all decoders become one, which names the file.

    Args:
        path: A regular file, or a link to one, in one of the `FORMATS`.
        content: What is in the file, if it was read already: `path` then only names it.

    Raises:
        UnreadableImageError: If the file cannot be opened or has more than `MAX_PIXELS`, if the pixels have more than 8
            bits a channel, or if the block raises an error; the message names the file.
    """
    try:
        if content is None and not stat.S_ISREG(os.stat(path).st_mode):  # reading from a pipe could wait for ever
            raise ValueError("no regular file")
        with Image.open(path if content is None else io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels; at most {MAX_PIXELS} are read")
            if image.mode.startswith(("I", "F")):
                raise ValueError("pixels of more than 8 bits; save it with 8 bits a channel")
            yield image
    except Exception as error:  # a damaged file may raise nearly anything
        raise unreadable(path, error) from error


def decoded(path: str | os.PathLike[str], upright: bool = True, content: bytes | None = None) -> Image.Image:
    """Decode an image file to RGB; transparency is dropped.

    Args:
        path: The file.
        upright: Whether to turn the image as its EXIF data say. Data that cannot be read are ignored.
        content: What is in the file, if it was read already.

    Raises:
        UnreadableImageError: If the file cannot be decoded, or its pixels have more than 8 bits a channel; the message
            names it.
    """
    with opened(path, content) as image:
        image.load()
        turn = _turn(image) if upright else None
        return (image if turn is None else image.transpose(turn)).convert("RGB")


def pixels(path: str | os.PathLike[str], upright: bool = True, content: bytes | None = None) -> Tensor:
    """Decode an image file as `decoded` does, to pixels: a JPEG file without the detour through Pillow's memory.

    Args:
        path: The file.
        upright: Whether to turn the image as its EXIF data say.
        content: What is in the file, if it was read already.

    Returns:
        uint8 `(3, H, W)`. The channels of a pixel lie beside each other in memory, for which torch's resizing is fast.

    Raises:
        UnreadableImageError: If `decoded` raises it.
    """
    with suppress(OSError, ValueError):  # Pillow may use what is not read here, or says why not
        if content is None and stat.S_ISREG(os.stat(path).st_mode):
            content = Path(path).read_bytes()
        height, width, colours, _ = decode_jpeg_header(content or b"")
        plain = int(height) * int(width) <= MAX_PIXELS and colours in ("YCbCr", "RGB", "Gray")
        if plain and not (upright and is_turned(path, content)):
            return torch.from_numpy(decode_jpeg(content)).permute(2, 0, 1)
    return tv.pil_to_tensor(decoded(path, upright, content))


def is_turned(path: str | os.PathLike[str], content: bytes | None) -> bool:
    """Say whether the EXIF data of a JPEG file turn the image; Pillow looks only if there are some."""
    if content is None or not any(
        content.find(word, 0, _header_end(content)) >= 0 for word in (b"Exif", b"rientation")
    ):
        return False
    with opened(path, content) as image:
        return _turn(image) is not None


def _header_end(content: bytes) -> int:
    """Return where the pixels of a JPEG file begin: searching them would take a twentieth of the time of decoding."""
    place = 2
    while (marker := content[place : place + 2]).startswith(b"\xff") and marker != b"\xff\xda":
        place += 1 if marker == b"\xff\xff" else 2 + int.from_bytes(content[place + 2 : place + 4])
    return place


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:  # not ImageOps.exif_transpose: it writes all EXIF data anew, and fails where any of them are odd
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged data may raise nearly anything
        return None


def fitted(image: Image.Image | Tensor, size: tuple[int, int], resize: int | None) -> Tensor:
    """Bring an image to a size, with its aspect ratio kept, by cutting out its centre.

    Args:
        image: The image; also as uint8 `(3, H, W)`.
        size: `(height, width)` to give.
        resize: Length to which the shorter side is scaled first; None scales the image until it covers the target.

    Returns:
        uint8 `(3, height, width)`.
    """
    if isinstance(image, Tensor):
        return fitted(tv.to_pil_image(image), size, resize)
    if resize is None:
        height, width = size
        return tv.pil_to_tensor(ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR))
    shorter, longer = sorted(image.size)
    if longer > MOST_ELONGATED * shorter:  # would take gigabytes when scaled: cut most of it off first
        needed = shorter * (math.ceil(max(size) / resize) + 2)  # and some more, so that the edges do not show
        image = tv.center_crop(image, [min(image.height, needed), min(image.width, needed)])
    return tv.pil_to_tensor(tv.center_crop(tv.resize(image, [resize]), list(size)))
