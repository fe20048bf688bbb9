import os
import stat
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torchvision.transforms.functional import pil_to_tensor

from knlightning.data.decoding import FORMATS, UnreadableImageError, decoded, fitted, opened, pixels, unreadable


def noise(width=40, height=30):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def test_a_postscript_program_is_not_run_whatever_its_name(tmp_path, monkeypatch):
    """Pillow has another program draw it, which it finds on the path."""
    trace = tmp_path / "trace"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {trace}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None, raising=False)
    path = tmp_path / "holiday.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(UnreadableImageError, match=r"holiday\.jpg: .*none of the formats JPEG, PNG"):
        decoded(path)
    assert not trace.exists()


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_formats_are_told_by_content_and_not_by_suffix(tmp_path, kind):
    path = tmp_path / "image.jpg"
    noise().save(path, kind)
    assert decoded(path).size == (40, 30)


def test_what_is_no_regular_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UnreadableImageError, match=r"pipe\.jpg: .*no regular file"):
        decoded(tmp_path / "pipe.jpg")
    os.symlink("nowhere", tmp_path / "link.jpg")
    with pytest.raises(UnreadableImageError, match=r"link\.jpg: .*No such file"):
        decoded(tmp_path / "link.jpg")


def png(width, height):
    """The head of a PNG of any size, without its pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        *[("RGB", {"format": "JPEG", "subsampling": kind, "quality": 75}) for kind in range(3)],
        ("RGB", {"format": "JPEG", "progressive": True}),
        ("L", {"format": "JPEG"}),
        ("CMYK", {"format": "JPEG"}),
        ("RGB", {"format": "PNG"}),
        ("RGB", {"format": "JPEG", "orientation": 6}),
    ],
)
def test_pixels_are_those_of_pillow(tmp_path, mode, options):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = options.get("orientation", 1)
    path = tmp_path / "image"
    noise(45, 31).convert(mode).save(path, exif=exif, **options)
    for upright in (True, False):
        expected = pil_to_tensor(decoded(path, upright))
        assert torch.equal(pixels(path, upright), expected)
        assert torch.equal(pixels("x", upright, path.read_bytes()), expected)


def test_damage_of_a_jpeg_file_is_told_as_by_pillow(tmp_path):
    path = tmp_path / "image.jpg"
    noise().save(path)
    content = path.read_bytes()
    for damaged in (b"", content[:300], content[:-200]):
        path.write_bytes(damaged)
        with pytest.raises(UnreadableImageError) as expected:
            decoded(path)
        with pytest.raises(UnreadableImageError) as told:
            pixels(path)
        assert str(told.value) == str(expected.value)
    path.unlink()
    for make in (lambda: None, lambda: os.mkfifo(path)):
        make()
        with pytest.raises(UnreadableImageError, match=r"image\.jpg: .*(No such file|no regular file)"):
            pixels(path)


def test_too_many_pixels_of_a_jpeg_file_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    noise().save(tmp_path / "large.jpg")
    monkeypatch.setattr("knlightning.data.decoding.MAX_PIXELS", 40 * 30 - 1)
    monkeypatch.setattr("knlightning.data.decoding.decode_jpeg", None)
    with pytest.raises(UnreadableImageError, match=r"large\.jpg: .*40x30 pixels; at most 1199"):
        pixels(tmp_path / "large.jpg")


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    path.write_bytes(png(100_000, 100_000))
    with pytest.raises(UnreadableImageError, match=r"large\.png: cannot be read"):
        decoded(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as scripts do that trust their images
    with pytest.raises(UnreadableImageError, match=r"large\.png: .*100000x100000 pixels; at most"):
        decoded(path)


def test_a_strip_is_cut_before_it_is_scaled():
    strip = Image.new("RGB", (1, 60_000), (9, 9, 9))
    for row in range(29_990, 30_010):
        strip.putpixel((0, row), (200, 100, 50))
    image = fitted(strip, (224, 224), 256)
    assert image.shape == (3, 224, 224)
    assert image.flatten(1).T.unique(dim=0).tolist() == [[200, 100, 50]]
    assert fitted(strip.transpose(Image.Transpose.ROTATE_90), (224, 224), 256).shape == (3, 224, 224)


def test_a_long_image_looks_the_same_whether_or_not_it_is_cut_first(monkeypatch):
    image = Image.fromarray(np.linspace(0, 255, 600 * 20 * 3).reshape(600, 20, 3).astype(np.uint8))
    whole = fitted(image, (32, 32), 36).int()
    monkeypatch.setattr("knlightning.data.decoding.MOST_ELONGATED", 10)
    assert (fitted(image, (32, 32), 36) - whole).abs().max() <= 2


def exif(*entries):
    """EXIF data of any tags, types and values, also such as Pillow would not write."""
    fields = b"".join(struct.pack(">HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(entries)) + fields + struct.pack(">III", 0, 1, 1)


TURN = (0x0112, 3, 1, struct.pack(">HH", 6, 0))


@pytest.mark.parametrize(
    ("data", "turned"),
    [
        (exif(TURN), True),
        (exif((0x0110, 5, 1, struct.pack(">I", 38)), TURN), True),  # the model of the camera as a fraction
        (exif((0x8769, 2, 4, b"abc\0"), TURN), True),  # text where the place of more data belongs
        (exif((0x0112, 2, 2, b"6\0\0\0")), False),  # the orientation as text
        (exif((0x0112, 3, 70_000, b"\xff\xff\xff\xff")), False),  # beyond the end
        (b"Exif\0\0MM\0*\0\0", False),
        (b"Exif\0\0nothing of the kind", False),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_exif_that_cannot_be_read_is_ignored(tmp_path, data, turned):
    path = tmp_path / "photo.jpg"
    noise(40, 30).save(path, exif=data)
    assert decoded(path).size == ((30, 40) if turned else (40, 30))
    assert torch.equal(pixels(path), pil_to_tensor(decoded(path)))
    assert decoded(path, upright=False).size == (40, 30)


def test_orientation_is_found_behind_other_segments_of_a_jpeg_file(tmp_path):
    path = tmp_path / "photo.jpg"
    noise().save(path, exif=exif(TURN))
    start, _, rest = path.read_bytes().partition(b"\xff\xe1")
    profile = b"\xff\xe2\x00\x08\xff\xda1234"  # with the bytes that begin the pixels, outside it
    path.write_bytes(start + profile + b"\xff\xff\xe1" + rest)
    assert pixels(path).shape == (3, 40, 30)


@pytest.mark.parametrize("orientation", range(10))
def test_orientations_are_those_of_exif(tmp_path, orientation):
    from PIL import ImageOps

    path = tmp_path / "photo.png"
    noise().save(path, exif=exif((0x0112, 3, 1, struct.pack(">HH", orientation, 0)))[6:])
    with Image.open(path) as image:
        assert decoded(path).tobytes() == ImageOps.exif_transpose(image).tobytes()


@pytest.mark.parametrize(
    "error", [IndexError("x"), struct.error("x"), NotImplementedError(), TypeError("x"), KeyError(1)]
)
def test_whatever_a_decoder_raises_names_the_file(tmp_path, error):
    noise().save(tmp_path / "a.png")
    with (
        pytest.raises(UnreadableImageError, match=r"a\.png: cannot be read as an image \(.+\)"),
        opened(tmp_path / "a.png"),
    ):
        raise error


def test_messages_do_not_write_to_the_terminal(tmp_path):
    error = unreadable("\x1b[2J\udce9.jpg", MemoryError())
    assert str(error).startswith(r"\x1b[2J\udce9.jpg: cannot be read as an image (there is not enough memory")
