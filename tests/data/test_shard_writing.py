import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from standins import write_image_folder

from knlightning.data import HuggingFaceDataModule, ImageFolderDataModule
from knlightning.data.datasets import TensorImages
from knlightning.data.shard_writing import read_classes, read_encoded, write_shards

NAMES = ("cat", "dog", "fox")


@pytest.fixture
def images():
    """Twenty images in memory."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (20, 3, 8, 6), dtype=torch.uint8, generator=generator)
    return TensorImages(pixels, torch.arange(20) % 3)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_images_in_memory_come_back_exactly_and_the_hub_s_library_reads_them(images, tmp_path):
    out = tmp_path / "out"
    assert write_shards(images, "train", str(out), NAMES, 6) == 4
    write_shards(images, "validation", str(out), NAMES, 6, shuffle=False)
    small = {"train_size": 8, "eval_resize": 8, "eval_size": 8, "num_workers": 0}
    data = HuggingFaceDataModule(out, cache_dir=tmp_path / "cache", augment=False, **small)
    data.setup("fit")
    assert data.class_names == NAMES
    read = data.val_dataloader().dataset
    assert read.labels.tolist() == images.labels.tolist()
    shuffled = data.train_dataloader().dataset.labels.tolist()
    assert shuffled != images.labels.tolist()
    assert sorted(shuffled) == sorted(images.labels.tolist())
    for number in (0, 19):
        assert torch.equal(torch.from_numpy(_pixels(read.encoded(number))), images[number][0])


def _pixels(content):
    return np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1).copy()


def test_files_are_stored_as_they_are(tmp_path):
    write_image_folder(tmp_path / "data", count=4)
    data = ImageFolderDataModule(tmp_path / "data", num_workers=0)
    data.setup("fit")
    dataset = data.train_dataloader().dataset
    write_shards(dataset, "train", str(tmp_path / "out"), data.class_names, shuffle=False)
    (row,) = parquet.read_table(tmp_path / "out" / "train-00000-of-00001.parquet").slice(5, 1).to_pylist()
    content = Path(dataset.path_of(5)).read_bytes()
    assert row == {"image": {"bytes": content, "path": None}, "label": int(dataset.labels[5])}
    size = sum(Path(dataset.path_of(index)).stat().st_size for index in range(8))
    assert (tmp_path / "out" / "train-00000-of-00001.parquet").stat().st_size < size + 2000


def test_an_interrupted_call_goes_on_and_ends_in_the_same_files(images, tmp_path, monkeypatch):
    write_shards(images, "train", str(tmp_path / "whole"), NAMES, 6)
    out = tmp_path / "out"
    written = []

    def interrupted(self, content):
        written.append(self)
        with self.open("wb") as file:
            file.write(content if len(written) != 3 else bytes(content)[:100])
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_shards(images, "train", str(out), NAMES, 6)
    assert sorted(contents(out)) == ["train-00000-of-00004.parquet", "train-00001-of-00004.parquet"]
    write_shards(images, "train", str(out), NAMES, 6)
    assert len(written) == 5
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(("names", "size"), [(NAMES[::-1], 6), (NAMES, 7), (NAMES, 20)])
def test_files_of_other_data_are_not_overwritten(images, tmp_path, names, size):
    write_shards(images, "train", str(tmp_path), NAMES, 6)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"files of other data lie there: train-0000.* Remove them, or choose another"):
        write_shards(images, "train", str(tmp_path), names, size)
    assert contents(tmp_path) == before


def test_a_file_that_was_not_written_whole_is_an_error(images, monkeypatch):
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.size", lambda *_: 7)
    with pytest.raises(OSError, match=r"/cut/train-00000-of-00001\.parquet: .*7 bytes of \d+ were written"):
        write_shards(images, "train", "memory://cut", NAMES)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "list: images with one class each are written, and at least one"),
        ([(0, torch.zeros(4, 4, dtype=torch.long))], "Images with masks are not"),
        ([(0, 0.5)], "images with one class each"),
        ([(0, "cat")], "images with one class each"),
    ],
)
def test_each_image_has_one_class(samples, message):
    with pytest.raises(ValueError, match=message):
        read_classes(samples)


def test_images_have_eight_bits():
    image = Image.new("RGB", (4, 3), "orange")
    assert _pixels(read_encoded([(image, 0)], 0))[:, 0, 0].tolist() == [255, 165, 0]
    with pytest.raises(ValueError, match=r"must be uint8 tensors or images of Pillow, got torch\.float32"):
        read_encoded([(torch.zeros(3, 4, 4), 0)], 0)
    with pytest.raises(ValueError, match="got str"):
        read_encoded([("image", 0)], 0)
