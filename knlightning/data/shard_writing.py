"""Shards written of any labelled images: Parquet files that `StreamingDataModule` and the library `datasets` read."""

import hashlib
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from knlightning.checks import ArgumentError, check_number
from knlightning.data.folder import abbreviated
from knlightning.data.samplers import generator_of
from knlightning.data.shards import storage, storage_errors
from knlightning.run_directory import replacing, sweep

if TYPE_CHECKING:
    import pyarrow as pa

READERS = 8
"""Number of images that are read at the same time."""
MARK = b"knlightning"
"""Where a shard says in its metadata what it was written of."""


def write_shards(
    dataset: Any, split: str, out: str, class_names: Sequence[str], images_per_shard: int = 1000, shuffle: bool = True
) -> int:
    """Write the shards of a split, which are called `OUT/SPLIT-00000-of-00012.parquet` and so on.

    Each gets its name when it is whole; after an interrupt the same call goes on with those that are missing. Image
    files are stored as they are, other images as PNG, without loss.

    Args:
        dataset: Images with labels: it has a length and gives uint8 `(C, H, W)`, or an image of Pillow, and a number
            from 0 for an index. A dataset with a method `encoded`, such as `LabelledFiles`, is asked for files.
        split: Name of the split.
        out: A local folder, or a URL that fsspec knows.
        class_names: Names of the classes; empty if they have none.
        images_per_shard: How many images a shard has.
        shuffle: Whether the order is random, always the same one; images that are sorted by class cannot be trained on
            shard by shard.

    Returns:
        Number of the shards.

    Raises:
        ArgumentError: If an argument is out of range.
        OSError: If images cannot be read, or shards not be written.
        ValueError: If the dataset holds something else, or other shards lie there.
    """
    from rich.progress import track

    check_number("images_per_shard", images_per_shard, at_least=1, integer=True)
    filesystem, folder = storage(out)
    labels = read_classes(dataset)
    order = torch.randperm(len(labels), generator=generator_of(0)) if shuffle else torch.arange(len(labels))
    mark = hashlib.sha256(repr((order.tolist(), labels, list(class_names), images_per_shard)).encode()).hexdigest()
    parts = order.split(images_per_shard)
    names = [f"{split}-{number:05}-of-{len(parts):05}.parquet" for number in range(len(parts))]
    with storage_errors(out):
        if "file" in filesystem.protocol:  # a bucket that does not exist is not made: its name may be mistyped
            Path(folder).mkdir(parents=True, exist_ok=True)
            sweep(Path(folder))
        there = {path.rpartition("/")[2] for path in filesystem.find(folder) if path.endswith(".parquet")}
    if strange := sorted(name for name in there - set(names) if name.startswith(f"{split}-")):
        raise _of_other_data(out, strange)
    for name, part in track(list(zip(names, parts, strict=True)), description=split):
        path = f"{folder}/{name}"
        if name in there:
            if _mark_of(filesystem, path) != mark.encode():
                raise _of_other_data(out, [name])
            continue
        content = _encode(dataset, labels, part.tolist(), class_names, mark)
        _write(filesystem, path, content)
    return len(parts)


def read_classes(dataset: Any) -> list[int]:
    """Return the class of each image of a dataset.

    Raises:
        ValueError: If images do not have one class each.
    """
    labels = getattr(dataset, "labels", None)
    if not isinstance(labels, Tensor):
        labels = [dataset[index][1] for index in range(len(dataset))]
    try:
        numbers = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.empty(0)
    if numbers.shape != (len(dataset),) or numbers.is_floating_point() or len(dataset) == 0:
        raise ValueError(
            f"{type(dataset).__name__}: images with one class each are written, and at least one. Images with masks "
            "are not; HuggingFaceSegmentationDataModule reads them from Parquet files on a local disk."
        )
    return numbers.tolist()


def read_encoded(dataset: Any, index: int) -> bytes:
    """Return an image of a dataset as the content of a file.

    Raises:
        OSError: If its file cannot be read.
        ValueError: If it is neither uint8 nor an image of Pillow.
    """
    if hasattr(dataset, "encoded"):
        return dataset.encoded(index)
    image = dataset[index][0]
    if isinstance(image, Tensor) and image.dtype == torch.uint8:
        image = tv.to_pil_image(image)
    if not isinstance(image, Image.Image):
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"{type(dataset).__name__}: images must be uint8 tensors or images of Pillow, got {kind}.")
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _encode(dataset: Any, labels: Sequence[int], part: list[int], class_names: Sequence[str], mark: str) -> "pa.Buffer":
    """Make a shard of some images."""
    import pyarrow as pa
    from pyarrow import parquet

    with ThreadPoolExecutor(READERS) as pool:
        images = list(pool.map(partial(read_encoded, dataset), part))
    feature: dict[str, Any] = {"_type": "Value", "dtype": "int64"}
    if class_names:
        feature = {"_type": "ClassLabel", "names": list(class_names)}
    stated = json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": feature}}})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind), ("label", pa.int64())], {"huggingface": stated, MARK: mark})
    sink = pa.BufferOutputStream()
    try:
        rows = pa.array([{"bytes": image, "path": None} for image in images], kind)
        table = pa.table([rows, [labels[index] for index in part]], schema)
    except (pa.ArrowException, TypeError) as error:
        raise ArgumentError("images_per_shard", len(part), "so low that a shard has less than 2 GB") from error
    # statistics would hold some images five times
    options = {"use_dictionary": False, "compression": "none", "write_statistics": False}
    parquet.write_table(table, sink, write_page_checksum=True, **options)
    return sink.getvalue()


def _write(filesystem: Any, path: str, content: "pa.Buffer") -> None:
    """Write a file that has its name only when it is whole."""
    with storage_errors(path):
        if "file" in filesystem.protocol:
            with replacing(Path(path)) as unfinished:
                unfinished.write_bytes(content)
        else:  # other storages show whole files alone
            filesystem.pipe_file(path, content.to_pybytes())
        if (size := filesystem.size(path)) != content.size:
            raise ValueError(f"{size} bytes of {content.size} were written")


def _mark_of(filesystem: Any, path: str) -> bytes | None:
    from pyarrow import parquet

    with storage_errors(path), filesystem.open(path, "rb", cache_type="none") as file:
        metadata = parquet.read_schema(file).metadata or {}
        return metadata.get(MARK)


def _of_other_data(out: str, names: Sequence[str]) -> ValueError:
    return ValueError(
        f"{out}: files of other data lie there: {abbreviated(names)}. Remove them, or choose another folder."
    )
