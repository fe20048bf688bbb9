import os
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image
from standins import Malicious, write_imagenet32

from knlightning.data.imagenet32_files import find_sources, read_blocks, read_class_map

TRAIN = [f"train_data_batch_{number}" for number in range(1, 11)]
WNIDS = [f"n{number:08}" for number in range(1000)]


def read(root, train):
    images, labels = zip(*read_blocks(find_sources(root, train)), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def test_nothing_is_found_where_nothing_is(tmp_path):
    assert find_sources(tmp_path, train=True) == []
    assert read_class_map(tmp_path) == {}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("n00000000 1", "line 1: must be 'wnid number name', found 'n00000000 1'"),
        ("n00000000 one cat", "line 1: must be 'wnid number name'"),
        ("n00000000 2 cat", "1000 classes numbered from 1 are needed, each once"),
        ("n00000001 1 cat", "1000 classes numbered from 1 are needed, each once"),
    ],
)
def test_a_wrong_class_map_is_named(tmp_path, line, message):
    lines = [line, *(f"n{number - 1:08} {number} name" for number in range(2, 1001))]
    (tmp_path / "map_clsloc.txt").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"{tmp_path / 'map_clsloc.txt'}.*{message}"):
        read_class_map(tmp_path)


def broken(content, **changes):
    return {key: value for key, value in (content | changes).items() if value is not None}


@pytest.mark.parametrize("pickles", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": np.zeros((5, 3071), np.uint8)}, r"'data' must be uint8 of shape \(N, 3072\), found uint8 of shape"),
        ({"data": np.zeros((5, 3072), np.float32)}, "'data' must be uint8 .*found float32"),
        ({"data": None}, "a dict with the key 'data' is needed, found the keys labels"),
        ({"labels": np.array([1, 2, 3, 4])}, r"'labels' must be 5 whole numbers, found int64 of shape \(4,\)"),
        ({"labels": np.array([1.0, 2, 3, 4, 5])}, "'labels' must be 5 whole numbers"),
        ({"labels": np.array([1, 2, 3, 4, 1001])}, "'labels' must be 1 to 1000, found 1 to 1001"),
        ({"labels": np.array([1, 2, 3, 4, 0])}, "'labels' must be 1 to 1000, found 0 to 4"),
    ],
)
def test_wrong_contents_are_named_with_the_file(tmp_path, pickles, changes, message):
    content = broken(write_imagenet32(tmp_path, pickles)[TRAIN[4]], **changes)
    if pickles:
        path = tmp_path / TRAIN[4]
        path.write_bytes(pickle.dumps({k: v.tolist() if k == "labels" else v for k, v in content.items()}, protocol=2))
    else:
        path = tmp_path / "Imagenet32_train_npz" / f"{TRAIN[4]}.npz"
        np.savez(path, **content)
    with pytest.raises(ValueError, match=f"{path}: {message}"):
        read(tmp_path, train=True)


@pytest.mark.parametrize("labels", [[[1], [1, 2], 1, 1, 1], ["1"] * 5, {}])
def test_strange_labels_in_pickles_are_named(tmp_path, labels):
    contents = write_imagenet32(tmp_path, pickles=True)
    (tmp_path / TRAIN[0]).write_bytes(pickle.dumps(contents[TRAIN[0]] | {"labels": labels}, protocol=2))
    with pytest.raises(ValueError, match=f"{tmp_path / TRAIN[0]}: 'labels' must be 5 whole numbers"):
        read(tmp_path, train=True)


def corrupt(path):
    """Change a byte of the stored images, which the archive's checksum finds."""
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("data.npy").header_offset + 1000
    content = bytearray(path.read_bytes())
    content[start] ^= 1
    path.write_bytes(content)


def test_damaged_files_are_named(tmp_path):
    write_imagenet32(tmp_path / "npz")
    path = tmp_path / "npz" / "Imagenet32_val_npz" / "val_data.npz"
    whole = path.read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(3))
    for damage in (
        lambda: path.write_bytes(whole[: len(whole) // 2]),
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(pickle.dumps({})),
        lambda: path.write_bytes((tmp_path / "array.npy").read_bytes()),
        lambda: (path.write_bytes(whole), corrupt(path)),
        lambda: np.savez(path, data=np.array([{}]), labels=[1]),
    ):
        damage()
        with pytest.raises(ValueError, match=f"{path}: no npz file of plain arrays"):
            read(tmp_path / "npz", train=False)
    write_imagenet32(tmp_path, pickles=True)
    (tmp_path / "val_data").write_bytes((tmp_path / "val_data").read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{tmp_path / 'val_data'}: no pickle of plain data"):
        read(tmp_path, train=False)


@pytest.mark.parametrize("pickles", [False, True])
def test_a_malicious_file_is_named_and_not_run(tmp_path, pickles):
    write_imagenet32(tmp_path, pickles)
    trace = tmp_path / "was_run"
    evil = Malicious(os.mkdir, str(trace))
    if pickles:
        path = tmp_path / "val_data"
        path.write_bytes(pickle.dumps({"data": evil}, protocol=2))
    else:
        path = tmp_path / "Imagenet32_val_npz" / "val_data.npz"
        np.savez(path, data=np.array([evil], object), labels=[1])
    with pytest.raises(ValueError, match=str(path)):
        read(tmp_path, train=False)
    assert not trace.exists()


def test_wrong_folders_are_named(tmp_path):
    (tmp_path / "val" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"{tmp_path / 'val'}: 1000 folders of classes are needed, found 1\."):
        read(tmp_path, train=False)
    (tmp_path / "val" / "cat").rmdir()
    for wnid in WNIDS:
        (tmp_path / "val" / wnid).mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path / 'val'}: no images in the folder n00000000"):
        read(tmp_path, train=False)
    Image.new("RGB", (32, 31)).save(tmp_path / "val" / WNIDS[0] / "a.png")
    with pytest.raises(ValueError, match=rf"{WNIDS[0]}/a\.png: must have 32x32 pixels, found 32x31"):
        read(tmp_path, train=False)


def write_npz(path, header, data=b"", name="data.npy", method=zipfile.ZIP_STORED):
    """An npz file with the head of an array, which need not fit its content."""
    text = repr(header).encode().ljust(117) + b"\n"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(name, b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data)


@pytest.mark.parametrize(
    ("shape", "descr", "message"),
    [
        ((10**9, 3072), "|u1", r"data\.npy cannot be uint8 of shape"),
        ((10**30, 3072), "|u1", "no npz file of plain arrays"),
        ((-1, 3072), "|u1", "no npz file of plain arrays"),
        ((1, 3072), "|O", "no npz file of plain arrays"),
        ("all", "|u1", "no npz file of plain arrays"),
    ],
)
def test_heads_that_promise_more_than_the_file_holds(tmp_path, shape, descr, message):
    path = tmp_path / "val_data.npz"
    write_npz(path, {"descr": descr, "fortran_order": False, "shape": shape}, bytes(3072))
    with pytest.raises(ValueError, match=f"{path}: .*{message}"):
        read(tmp_path, train=False)


def test_an_array_that_grows_when_it_is_unpacked_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("knlightning.data.imagenet32_files.MOST_BYTES", 10_000)
    path = tmp_path / "val_data.npz"
    header = {"descr": "|u1", "fortran_order": False, "shape": (10, 3072)}
    write_npz(path, header, bytes(30_720), method=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"val_data\.npz: .*data\.npy has 30848 bytes, at most 10000"):
        read(tmp_path, train=False)


def test_an_encrypted_file_is_named(tmp_path):
    path = tmp_path / "val_data.npz"
    write_npz(path, {"descr": "|u1", "fortran_order": False, "shape": (1, 3072)}, bytes(3072))
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"val_data\.npz: .*encrypted"):
        read(tmp_path, train=False)


def test_the_arrays_that_are_there_are_named(tmp_path):
    np.savez(tmp_path / "val_data.npz", X_train=np.zeros((2, 3072), np.uint8), Y_train=[1, 2])
    with pytest.raises(ValueError, match="the key 'data' is needed, found the keys X_train, Y_train"):
        read(tmp_path, train=False)
