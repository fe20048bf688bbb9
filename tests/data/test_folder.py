import os

import numpy as np
import pytest
import torch
from PIL import Image

from knlightning.data import DigitsDataModule, FolderImages
from knlightning.data.folder import abbreviated, find_classes, find_images, find_images_in


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
        FolderImages(tmp_path, (8, 8))


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


@pytest.fixture
def tree(tmp_path):
    """Two classes; one has a hidden folder, a link to a folder elsewhere, and links that lead back."""
    for name in ("disk/far.png", "root/cat/1.png", "root/cat/.thumbnails/1.png", "root/dog/b/2.png", "root/.git/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        gradient(9, 9).save(tmp_path / name)
    (tmp_path / "root/dog/a").symlink_to(tmp_path / "root/dog/b")  # a second way to the same folder
    (tmp_path / "root/dog/up").symlink_to(tmp_path / "root/dog")
    (tmp_path / "root/dog/far").symlink_to(tmp_path / "disk")
    (tmp_path / "root/owl").symlink_to(tmp_path / "disk")
    return tmp_path / "root"


def test_links_are_followed_and_hidden_folders_left_out(tree, caplog):
    classes = find_classes(tree)
    assert classes == ["cat", "dog", "owl"]
    with caplog.at_level("INFO"):
        found = find_images_in(tree, classes)
    names = [[os.path.relpath(path, tree) for path in paths] for paths in found]
    assert names == [["cat/1.png"], ["dog/b/2.png", "dog/far/far.png"], ["owl/far.png"]]
    assert f"{tree}: 1 hidden files or folders left out (cat/.thumbnails)." in caplog.text
    assert f"{tree}: 4 links to folders followed (dog/a, dog/far, dog/up, owl)." in caplog.text


def test_the_folder_itself_may_be_hidden_or_a_link(tree):
    assert len(find_images(tree / "cat" / ".thumbnails")) == 1
    assert len(find_images(tree / "owl")) == 1


def test_hidden_folders_of_classes_are_said(tree, caplog):
    with caplog.at_level("INFO"):
        find_classes(tree)
    assert "1 hidden folders left out (.git)" in caplog.text


def test_links_between_folders_end(tmp_path):
    for name in "abcdefgh":
        (tmp_path / name).mkdir()
    for name in "abcdefgh":
        for other in "abcdefgh":
            (tmp_path / name / f"to_{other}").symlink_to(tmp_path / other)
        gradient(9, 9).save(tmp_path / name / "image.png")
    assert find_images(tmp_path) == [str(tmp_path / name / "image.png") for name in "abcdefgh"]


def test_a_folder_without_rights_is_named(tree, monkeypatch):
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)  # as root, tests may read everything
    with pytest.raises(OSError, match=rf"^{tree}/dog/b: the folder cannot be read \(Permission denied\)"):
        find_images(tree)


def test_names_in_messages_do_not_write_to_the_terminal():
    assert abbreviated(["\x1b[2J", "b", "c", "d", "e", "f"]) == r"\x1b[2J, b, c, d, e and 1 more"


def test_damaged_images_may_be_skipped_and_are_counted(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for name in ("a.jpg", "cut.jpg"):
        Image.fromarray(noise).save(tmp_path / name)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:2000])
    (tmp_path / "text.jpg").write_text("no image")
    images = FolderImages(tmp_path, (8, 8), skip_damaged=True)
    batch, paths = images.collate([images[number] for number in range(3)])
    assert batch.shape == (1, 3, 8, 8)
    assert paths == [str(tmp_path / "a.jpg")]
    said = r"2 of the 3 images could not be read, and have no prediction: .*cut\.jpg: .*truncated.*text\.jpg: .*none of"
    with pytest.warns(UserWarning, match=said):
        images.report()
    images.report()  # nothing new
    (tmp_path / "a.jpg").write_text("no image")
    (tmp_path / "cut.jpg").write_text("no image")
    with pytest.raises(ValueError, match="none of the 3 images can be read"):
        FolderImages(tmp_path, (8, 8), skip_damaged=True)


def test_memory_that_is_lacking_is_named_and_skipped(tmp_path, monkeypatch):
    def hungry(*_):
        raise MemoryError

    gradient(9, 9).save(tmp_path / "large.png")
    monkeypatch.setattr("knlightning.data.folder.fitted", hungry)
    with pytest.raises(ValueError, match=r"large\.png: .*not enough memory"):
        FolderImages(tmp_path, (8, 8))[0]
    assert FolderImages(tmp_path, (8, 8), skip_damaged=True)[0] is None


def test_a_batch_of_none_has_the_shape_of_others(tmp_path):
    gradient(9, 9).save(tmp_path / "a.png")
    assert FolderImages(tmp_path, (8, 6)).empty_batch()[0].shape == (0, 3, 8, 6)
    assert FolderImages(tmp_path, None).empty_batch()[0].shape[:2] == (0, 3)
