"""Parquet files of images on any storage (shards): found, and copied whole into a bounded cache on the local disk."""

import fcntl
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from knlightning.checks import ArgumentError, check
from knlightning.data.folder import abbreviated
from knlightning.run_directory import replacing, sweep
from knlightning.text import printable

if TYPE_CHECKING:
    import pyarrow as pa

EXTRA = "pip install 'knlightning[streaming]'"
NUMBERED = re.compile(r"-(\d{5,})-of-(\d{5,})\b")
"""What names of shards say: the number of a shard, from 0, and how many there are."""
READERS = 16
"""Number of files whose labels are read at the same time."""
PART, PARTS = 2**23, 8
"""Bytes of a request to the storage, and how many requests are made at the same time."""
ROWS = 100
"""Images in a block of a copy."""


class Shard(NamedTuple):
    """A file on the storage.

    Attributes:
        path: Its path there.
        size: Its bytes.
        version: Differs if its content does.
    """

    path: str
    size: int
    version: str


class Labels(NamedTuple):
    """The labels in a shard.

    Attributes:
        values: Of its rows.
        names: Names of the classes, if they are stated.
    """

    values: list[Any]
    names: tuple[str, ...]


def check_installed(user: str) -> None:
    """Check that what reads shards is installed.

    Args:
        user: What needs it.

    Raises:
        ValueError: If it is not.
    """
    if any(importlib.util.find_spec(package) is None for package in ("fsspec", "pyarrow")):
        raise ValueError(f"{user} needs pyarrow: {EXTRA}.")


@contextmanager
def storage_errors(path: str) -> Iterator[None]:
    """Make an OSError that names the path of whatever a storage or pyarrow raises.

    Raises:
        OSError: If the block raises anything but an ArgumentError.
    """
    try:
        yield
    except ArgumentError:
        raise
    except Exception as error:  # each storage has its own
        reason = printable(str(error)) or type(error).__name__
        raise OSError(f"{printable(path)}: cannot be read or written ({reason}).") from error


def storage(root: str) -> tuple[Any, str]:
    """Return the storage on which a folder lies, and the path of the folder there.

    Args:
        root: A local folder, or a URL that fsspec knows, such as `s3://bucket/folder`.

    Raises:
        ValueError: If the library of this storage is not installed, or there is no such storage.
    """
    return _storage(root if "://" in root else os.path.abspath(root), os.getpid())


@cache
def _storage(root: str, process: int) -> tuple[Any, str]:
    """Connect to a storage; a forked process cannot use the connections of its parent."""
    import fsspec

    try:
        filesystem, path = fsspec.url_to_fs(root)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{root}: {error}. For S3: {EXTRA}.") from error
    return filesystem, path.rstrip("/")


def find_shards(root: str, split: str) -> list[Shard]:
    """List the shards of a split: files `SPLIT-*.parquet` or `SPLIT/*.parquet` in a folder or its subfolders.

    Args:
        root: A local folder or a URL.
        split: Name of the split.

    Returns:
        Sorted by their paths.

    Raises:
        FileNotFoundError: If there are none.
        OSError: If the storage cannot be read.
        ValueError: If one is missing of those that the names count.
    """
    filesystem, folder = storage(root)
    with storage_errors(root):
        found = filesystem.find(folder, detail=True)
    shards = []
    for path, info in sorted(found.items()):
        parent, _, name = path.removeprefix(folder).rpartition("/")
        if name.startswith((f"{split}-", f"{split}.")) or (parent.endswith(f"/{split}") and not name.startswith(".")):
            if not name.endswith(".parquet"):
                continue
            known = [info.get(key) for key in ("size", "ETag", "etag", "md5Hash", "blob_id", "mtime")]
            version = hashlib.sha256(repr((root, path, known)).encode()).hexdigest()[:32]
            shards.append(Shard(path, int(info["size"]), version))
    if not shards:
        raise FileNotFoundError(
            f"There are no files {split}-*.parquet or {split}/*.parquet in {root}. The arguments root, train_name, "
            "val_name and test_name say what is read."
        )
    numbers = [tuple(map(int, found.groups())) for shard in shards if (found := NUMBERED.search(shard.path))]
    for count in {count for _, count in numbers}:
        if missing := set(range(count)) - {number for number, of in numbers if of == count}:
            names = abbreviated([f"{split}-{number:05}-of-{count:05}" for number in sorted(missing)])
            raise ValueError(f"{root}: {len(missing)} of the {count} files are missing: {names}. Write or copy them.")
    return shards


def read_labels(root: str, shards: Sequence[Shard], image_column: str, label_column: str) -> list[Labels]:
    """Read the labels of shards; of the images nothing is read.

    Args:
        root: Where they were found.
        shards: The shards.
        image_column: Their column of images: of bytes, or of structures with a field `bytes`.
        label_column: Their column of labels.

    Raises:
        ArgumentError: If a column is missing, or that of images holds something else.
        OSError: If a shard cannot be read.
    """
    from pyarrow import parquet

    def read(shard: Shard) -> Labels:
        filesystem, _ = storage(root)
        with storage_errors(shard.path), filesystem.open(shard.path, "rb", cache_type="none") as file:
            table = parquet.ParquetFile(file, page_checksum_verification=True, pre_buffer=True)
            schema = table.schema_arrow
            for argument, column in (("image_column", image_column), ("label_column", label_column)):
                allowed = f"one of the columns of {root}: {abbreviated(schema.names)}"
                check(column in schema.names, argument, column, allowed)
            check(_leaf(schema, image_column) is not None, "image_column", image_column, "a column of images")
            values = table.read(columns=[label_column])[label_column].to_pylist()
            features = (
                json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
            )
            return Labels(values, tuple(features.get(label_column, {}).get("names") or ()))

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(read, shards))


def _leaf(schema: "pa.Schema", column: str) -> str | None:
    """Return the path of a column's bytes in Parquet; None if it has none."""
    from pyarrow import types

    kind = schema.field(column).type
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return f"{column}.bytes"
    return column if types.is_binary(kind) or types.is_large_binary(kind) else None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock, for which others wait."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:  # a process that was forked meanwhile has the file open too, so that closing it would free nothing
            fcntl.flock(lock, fcntl.LOCK_UN)


class ShardCache:
    """Copies of shards on the local disk. Those that were opened longest ago make room for others.

    All processes of a machine, and several runs, may share a folder. Copies are Arrow files of the encoded images
    alone, which are mapped into memory. They may be deleted at any time.

    Args:
        root: Where the shards were found.
        column: Their column of images.
        folder: Folder of the copies.
        most_bytes: How many bytes the copies may take, and the shards that are still copied.
    """

    def __init__(self, root: str, column: str, folder: Path, most_bytes: int) -> None:
        self.root, self.column, self.folder, self.most_bytes = root, column, folder, most_bytes

    def images(self, shard: Shard) -> "pa.ChunkedArray":
        """Return the encoded images of a shard, which is copied first if it is not there.

        Raises:
            OSError: If it cannot be read, or not be copied.
        """
        import pyarrow as pa

        path = self._path(shard)
        while True:
            try:
                mapped = pa.memory_map(str(path))
            except FileNotFoundError:  # or another process has just removed it
                self.fetch(shard)
                continue
            with suppress(FileNotFoundError):
                os.utime(path)
            with storage_errors(str(path)):
                return pa.ipc.open_file(mapped).read_all().column(0)

    def fetch(self, shard: Shard) -> None:
        """Copy a shard, unless it is there.

        Raises:
            OSError: If it cannot be read, or not be copied.
        """
        path = self._path(shard)
        if path.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # one at a time, by all processes: so each shard is read once, and the bound holds
        with _locked(self.folder / "lock"):
            if not path.exists():
                sweep(self.folder)
                self._make_room(shard.size)
                with replacing(path) as unfinished, storage_errors(shard.path):
                    self._copy(shard, unfinished)

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.version}-{hashlib.sha256(self.column.encode()).hexdigest()[:8]}.arrow"

    def _make_room(self, needed: int) -> None:
        copies = [(path.stat(), path) for path in self.folder.glob("*.arrow")]
        free = self.most_bytes - needed - sum(status.st_size for status, _ in copies)
        for status, path in sorted(copies, key=lambda copy: copy[0].st_mtime_ns):
            if free < 0:
                path.unlink(missing_ok=True)
                free += status.st_size

    def _copy(self, shard: Shard, path: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        source = pa.BufferReader(pa.py_buffer(self._download(shard)))
        with parquet.ParquetFile(source, page_checksum_verification=True) as table, path.open("wb") as file:
            leaf = _leaf(table.schema_arrow, self.column)
            with pa.ipc.new_file(file, pa.schema([("bytes", pa.large_binary())])) as copy:
                for batch in table.iter_batches(ROWS, columns=[leaf]):
                    (column,) = batch.columns
                    images = column.flatten()[0] if pa.types.is_struct(column.type) else column
                    copy.write_batch(pa.record_batch([images.cast(pa.large_binary())], ["bytes"]))

    def _download(self, shard: Shard) -> bytearray:
        """Read a shard by several requests at a time."""
        filesystem, _ = storage(self.root)
        content = bytearray(shard.size)
        for first in range(0, shard.size, PART * PARTS):
            starts = list(range(first, min(first + PART * PARTS, shard.size), PART))
            ends = [min(start + PART, shard.size) for start in starts]
            parts = filesystem.cat_ranges([shard.path] * len(starts), starts, ends, on_error="raise")
            for start, part in zip(starts, parts, strict=True):
                content[start : start + len(part)] = part
        return content
