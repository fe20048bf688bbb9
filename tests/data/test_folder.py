import numpy as np
import pytest
import torch
from PIL import Image

from knlightning.data import DigitsDataModule, FolderImages


def gradient(width, height):
    """Red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def test_images_are_found_in_subfolders_in_the_order_of_their_paths(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "a.JPG", "sub/c.bmp", "sub/.hidden.png"):
        gradient(9, 9).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    images = FolderImages(tmp_path, (5, 5))
    assert [name for _, name in images] == [str(tmp_path / name) for name in ("a.JPG", "b.png", "sub/c.bmp")]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK", "LA"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    gradient(12, 12).convert(mode).save(tmp_path / f"image.{suffix}")
    [(image, _)] = FolderImages(tmp_path, (5, 7))
    assert image.dtype == torch.uint8
    assert image.shape == (3, 5, 7)


def test_the_aspect_ratio_is_kept_and_the_centre_cut_out(tmp_path):
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = 255  # a white square in the middle
    Image.fromarray(wide).save(tmp_path / "wide.png")
    [(image, _)] = FolderImages(tmp_path, (10, 10))
    assert torch.equal(image, torch.full((3, 10, 10), 255, dtype=torch.uint8))
    [(image, _)] = FolderImages(tmp_path, (10, 40))  # the size it has: untouched
    assert torch.equal(image, torch.from_numpy(wide).permute(2, 0, 1))


def test_the_shorter_side_may_be_scaled_before_the_cut(tmp_path):
    gradient(60, 40).save(tmp_path / "wide.png")
    [(image, _)] = FolderImages(tmp_path, (16, 16), resize=20)
    resized = gradient(60, 40).resize((30, 20), Image.Resampling.BILINEAR)
    expected = np.asarray(resized)[2:18, 7:23]
    assert torch.equal(image, torch.from_numpy(expected.copy()).permute(2, 0, 1))


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    gradient(16, 16).save(tmp_path / "photo.png", exif=exif)
    [(image, _)] = FolderImages(tmp_path, (16, 16))
    expected = np.asarray(gradient(16, 16).rotate(-90))
    assert torch.equal(image, torch.from_numpy(expected.copy()).permute(2, 0, 1))


def test_missing_or_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        DigitsDataModule(predict_dir=tmp_path / "nowhere").setup("predict")
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(ValueError, match=rf"no images in {tmp_path}.*\.jpg \.jpeg \.png"):
        DigitsDataModule(predict_dir=tmp_path).setup("predict")


def test_a_file_that_is_no_image_is_named_before_anything_runs(tmp_path):
    gradient(9, 9).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"bad\.png: cannot be read as an image"):
        DigitsDataModule(predict_dir=tmp_path).setup("predict")


def test_more_than_8_bits_are_refused_instead_of_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 60_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png.*8 bits"):
        FolderImages(tmp_path, (4, 4))


def test_damage_behind_the_head_is_named_when_read(tmp_path):
    path = tmp_path / "cut.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    images = FolderImages(tmp_path, (32, 32))
    with pytest.raises(ValueError, match=r"cut\.jpg: cannot be read as an image"):
        images[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_images_and_paths(tmp_path, workers):
    for number in range(3):
        gradient(9, 9).save(tmp_path / f"{number}.png")
    data = DigitsDataModule(eval_batch_size=2, predict_dir=tmp_path, num_workers=workers)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert [images.shape for images, _ in batches] == [(2, 3, 32, 32), (1, 3, 32, 32)]
    assert [names for _, names in batches] == [[str(tmp_path / f"{n}.png") for n in part] for part in ([0, 1], [2])]
