import os
import time

import numpy as np
import pytest

from knlightning.data.image_cache import PREFIX, held, mapped, sweep, write_records


def records(num_blocks):
    """Blocks of two images, all of whose pixels are the number of the block."""
    for label in range(num_blocks):
        yield np.full((2, 3, 32, 32), label, np.uint8), np.full(2, label)


def test_two_processes_may_write_the_cache_at_once(tmp_path):
    def blocks(other):
        for label in range(3):
            if other and label == 1:
                write_records(path, blocks(other=False))
                assert mapped(path)["label"].tolist() == [0, 0, 1, 1, 2, 2]
            yield np.full((2, 3, 32, 32), label, np.uint8), np.full(2, label)

    path = tmp_path / "cache.npy"
    write_records(path, blocks(other=True))
    assert mapped(path)["label"].tolist() == [0, 0, 1, 1, 2, 2]
    assert mapped(path)["image"][:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert list(tmp_path.iterdir()) == [path]


HEADS = [b"\x93NUMPY\x01\x00\x10\x00{'descr': [(((((  ", b"\x93NUMPY\x01\x00\x04\x00{}  \n"]


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY\x01\x00", b"nothing at all", *HEADS])
def test_a_damaged_cache_is_named(tmp_path, damage):
    path = tmp_path / "cache.npy"
    write_records(path, records(3))
    path.write_bytes(damage or path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{path}: a damaged cache .*Delete it"):
        mapped(path)


def test_another_npy_file_is_no_cache(tmp_path):
    np.save(tmp_path / "cache.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"a damaged cache \(float64 of shape \(3,\)\)"):
        mapped(tmp_path / "cache.npy")


def test_nothing_is_left_behind_if_the_images_cannot_be_read(tmp_path):
    def damaged():
        yield from records(2)
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        write_records(tmp_path / "cache.npy", damaged())
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_removed(tmp_path):
    """Not what a living one writes, what is not a minute old, or what is not ours."""
    for name in (f"{PREFIX}dead", f"{PREFIX}alive", f"{PREFIX}new", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cache.npy").write_bytes(b"half")
        if not name.endswith("new"):
            os.utime(tmp_path / name, (time.time() - 3600,) * 2)
    with held(tmp_path / f"{PREFIX}alive"):
        write_records(tmp_path / "cache.npy", records(1))
        assert {path.name for path in tmp_path.iterdir()} == {f"{PREFIX}alive", f"{PREFIX}new", "other", "cache.npy"}
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{PREFIX}new", "other", "cache.npy"}
