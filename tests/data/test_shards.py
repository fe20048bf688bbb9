import fcntl
import io
import json
import multiprocessing
import time

import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet

from knlightning.data.shards import ShardCache, check_installed, find_shards, read_labels, storage

NAMES = json.dumps({"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}})


def write(path, images, labels, metadata=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": images, "label": labels}, metadata=metadata)
    parquet.write_table(table, path, **options)


def as_bytes(cache, shard):
    return [image.as_py() for image in cache.images(shard)]


@pytest.fixture
def root(tmp_path):
    """Four files of two images with 1,000 bytes each."""
    for number in range(4):
        images = [{"bytes": bytes([number, row] * 500), "path": None} for row in range(2)]
        write(tmp_path / "root" / f"train-0000{number}-of-00004.parquet", images, [0, 1], {"huggingface": NAMES})
    return str(tmp_path / "root")


def test_a_folder_above_is_no_split(tmp_path):
    write(tmp_path / "train" / "validation-0.parquet", [b""], [0])
    with pytest.raises(FileNotFoundError):
        find_shards(str(tmp_path / "train"), "train")


def test_files_of_a_split_are_found_by_their_names_and_folders(root, tmp_path):
    for name in (
        "validation/a.parquet",
        "validation/.b.parquet",
        "data/test-1.parquet",
        "train.txt",
        "training.parquet",
    ):
        write(tmp_path / "root" / name, [b""], [0])
    found = {
        split: [shard.path[len(root) + 1 :] for shard in find_shards(root, split)]
        for split in ("train", "validation", "test")
    }
    assert found == {
        "train": [f"train-0000{number}-of-00004.parquet" for number in range(4)],
        "validation": ["validation/a.parquet"],
        "test": ["data/test-1.parquet"],
    }
    with pytest.raises(FileNotFoundError, match=r"no files other-\*\.parquet or other/\*\.parquet in .* train_name"):
        find_shards(root, "other")


def test_a_missing_file_is_named(root, tmp_path):
    (tmp_path / "root" / "train-00002-of-00004.parquet").unlink()
    with pytest.raises(ValueError, match=r"1 of the 4 files are missing: train-00002-of-00004\. Write or copy them"):
        find_shards(root, "train")


def test_labels_and_names_are_read(root):
    labels = read_labels(root, find_shards(root, "train"), "image", "label")
    assert [part.values for part in labels] == [[0, 1]] * 4
    assert {part.names for part in labels} == {("cat", "dog")}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("picture", "label"), r"^image_column must be one of the columns of .*: image, label, got 'picture'"),
        (("image", "class"), r"^label_column must be one of the columns"),
        (("label", "label"), r"^image_column must be a column of images, got 'label'"),
    ],
)
def test_columns_are_checked(root, columns, message):
    with pytest.raises(ValueError, match=message):
        read_labels(root, find_shards(root, "train"), *columns)


def test_plain_bytes_are_images_too_and_empty_rows_stay(tmp_path):
    write(tmp_path / "train-0.parquet", pa.array([b"one", None], pa.binary()), [0, 1])
    write(tmp_path / "val-0.parquet", pa.array([None, {"bytes": b"two"}]), [0, 1])
    cache = ShardCache(str(tmp_path), "image", tmp_path / "cache", 10**6)
    (first,), (second,) = (find_shards(str(tmp_path), split) for split in ("train", "val"))
    assert as_bytes(cache, first) == [b"one", None]
    assert as_bytes(cache, second) == [None, b"two"]


def test_the_cache_keeps_its_bound_and_what_was_opened_last(root, tmp_path):
    shards = find_shards(root, "train")
    folder = tmp_path / "cache"
    one = ShardCache(root, "image", tmp_path / "one", 10**6)
    one.fetch(shards[0])
    (size,) = [path.stat().st_size for path in (tmp_path / "one").glob("*.arrow")]
    cache = ShardCache(root, "image", folder, 2 * size + max(shard.size for shard in shards))
    folder.mkdir()
    (folder / ".99999999-left.tmp").touch()  # by a process that was killed
    opened = []
    for number in (0, 1, 0, 2, 0, 3):
        before = set(folder.glob("*.arrow"))
        assert as_bytes(cache, shards[number]) == [bytes([number, row] * 500) for row in range(2)]
        opened.append(len(set(folder.glob("*.arrow")) - before))
        assert sum(path.stat().st_size for path in folder.iterdir()) <= cache.most_bytes
    assert opened == [1, 1, 0, 1, 0, 1]  # the first one stayed throughout
    assert not list(folder.glob(".*.tmp"))


def test_a_file_that_changes_is_read_anew(root, tmp_path):
    cache = ShardCache(root, "image", tmp_path / "cache", 10**6)
    before = find_shards(root, "train")[0]
    cache.fetch(before)
    write(tmp_path / "root" / "train-00000-of-00004.parquet", [{"bytes": b"new"}], [0])
    assert as_bytes(cache, find_shards(root, "train")[0]) == [b"new"]


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_file_is_named_and_leaves_no_copy(tmp_path, damage):
    path = tmp_path / "train-0.parquet"
    options = {"use_dictionary": False, "compression": "none", "write_statistics": False, "write_page_checksum": True}
    write(path, [{"bytes": b"abcdefgh" * 500}], [0], **options)
    content = path.read_bytes()
    path.write_bytes(content[:-50] if damage == "cut" else content.replace(b"hab", b"xab", 1))
    cache = ShardCache(str(tmp_path), "image", tmp_path / "cache", 10**6)
    with pytest.raises(OSError, match=r"train-0\.parquet: cannot be read or written \("):
        cache.images(*find_shards(str(tmp_path), "train"))
    assert not list((tmp_path / "cache").glob("*.arrow"))


def _copy(root, folder, start, reads):
    cache = ShardCache(root, "image", folder, 10**6)
    download = cache._download

    def counted(shard):
        with reads.get_lock():
            reads.value += 1
        return download(shard)

    cache._download = counted
    start.wait()
    for shard in find_shards(root, "train"):
        cache.fetch(shard)


def test_processes_read_each_file_once(root, tmp_path):
    context = multiprocessing.get_context("fork")
    reads, start = context.Value("i", 0), context.Barrier(3)
    workers = [context.Process(target=_copy, args=(root, tmp_path / "cache", start, reads)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert reads.value == 4


def test_a_process_that_is_forked_while_a_file_is_copied_holds_up_nobody(root, tmp_path, monkeypatch):
    cache = ShardCache(root, "image", tmp_path / "cache", 10**6)
    context, copy = multiprocessing.get_context("fork"), cache._copy
    idle = context.Process(target=time.sleep, args=(60,))
    monkeypatch.setattr(cache, "_copy", lambda *args: (idle.start(), copy(*args)))
    cache.fetch(find_shards(root, "train")[0])
    with (tmp_path / "cache" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # or BlockingIOError
    idle.kill()
    idle.join()


def test_other_storages_are_read_by_parts(monkeypatch, tmp_path):
    monkeypatch.setattr("knlightning.data.shards.PART", 64)  # and so several rounds of requests
    file = io.BytesIO()
    parquet.write_table(pa.table({"image": [{"bytes": bytes(range(256)) * 4}], "label": [0]}), file)
    fsspec.filesystem("memory").pipe_file("/bucket/train-0.parquet", file.getvalue())
    (shard,) = find_shards("memory://bucket", "train")
    assert as_bytes(ShardCache("memory://bucket", "image", tmp_path, 10**6), shard) == [bytes(range(256)) * 4]


def test_what_is_not_installed_is_named(monkeypatch):
    with pytest.raises(ValueError, match=r"nosuch://bucket: .* For S3: pip install 'knlightning\[streaming\]'"):
        storage("nosuch://bucket")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"Reader needs pyarrow: pip install 'knlightning\[streaming\]'"):
        check_installed("Reader")
