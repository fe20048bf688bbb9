"""Measure how fast a process makes training images of JPEG files, beside torchvision's reference, timm, and DALI.

    python experiments/decoding.py

NVIDIA DALI runs on the CPU, and takes part if it is installed: `pip install nvidia-dali-cuda120`.

All crop, scale, and mirror at random, to 224x224 pixels, and make batches. Files are parts of 500x375 pixels of the
two photographs that come with scikit-learn. What is measured are images in a second of processor time of a single
thread, which does not depend on what else the machine does. The ways run in turn; ratios are taken within a round.
"""

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data.dataset import ImageDataset
from timm.data.loader import fast_collate
from timm.data.transforms_factory import create_transform
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from knlightning.checks import check_number
from knlightning.commands.command import command
from knlightning.data import ImageFolderDataModule
from knlightning.data.labelled_files import IMAGENET_MEAN, IMAGENET_STD

SIZE = 224
REFERENCE = "torchvision's reference, Pillow"


def write_images(folder: Path, count: int) -> None:
    """Write JPEG files of photographs, 500x375 pixels, as large as those of ImageNet, in a class for each photograph.

    Args:
        folder: Where `train` is made, and `val` as a link to it.
        count: Number of files.
    """
    generator = np.random.default_rng(0)
    for number in range(count):
        photograph = load_sample_images().images[number % 2]
        top, left = (
            int(generator.integers(0, room - part + 1))
            for room, part in zip(photograph.shape, (375, 500), strict=False)
        )
        path = folder / "train" / str(number % 2) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph[top : top + 375, left : left + 500]).save(path, quality=95)
    (folder / "val").symlink_to("train")


def ours(folder: Path, batch_size: int) -> tuple[Iterable[Any], ImageFolderDataModule]:
    """Make the loader of the datamodule, and the datamodule."""
    data = ImageFolderDataModule(folder, batch_size=batch_size, num_workers=0, drop_last=False)
    data.setup("fit")
    return data.train_dataloader(), data


def references(folder: Path, batch_size: int) -> dict[str, Iterable[Any]]:
    """Make the loaders of others, by their names."""
    load = partial(DataLoader[Any], batch_size=batch_size, shuffle=True)
    scale = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(IMAGENET_MEAN), list(IMAGENET_STD))]
    pillow = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
            transforms.ConvertImageDtype(torch.float),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    second = v2.Compose([v2.PILToTensor(), v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), *scale])
    # the form for timm's loader on a GPU, which scales there; without its default changes of colours
    timm = create_transform(SIZE, True, color_jitter=0.0, interpolation="bilinear", use_prefetcher=True)
    train = folder / "train"
    return {
        REFERENCE: load(ImageFolder(str(train), pillow)),
        "torchvision's reference, v2": load(ImageFolder(str(train), second)),
        "timm": load(ImageDataset(str(train), transform=timm), collate_fn=fast_collate),
    }


def dali(folder: Path, count: int, batch_size: int) -> Callable[[], Iterator[Any]]:
    """Make what reads all images once with NVIDIA DALI, which decodes no more than the crop."""
    from nvidia.dali import Pipeline, fn

    # without threads that read ahead: their time would be counted for what runs next
    alone = {"prefetch_queue_depth": 1, "exec_async": False, "exec_pipelined": False}
    with Pipeline(batch_size=batch_size, num_threads=1, device_id=None, **alone) as pipeline:
        files, labels = fn.readers.file(file_root=str(folder / "train"), random_shuffle=True)
        crops = fn.decoders.image_random_crop(files, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3])
        images = fn.flip(fn.resize(crops, size=[SIZE, SIZE]), horizontal=fn.random.coin_flip())
        pipeline.set_outputs(images, labels)
    pipeline.build()
    return lambda: (pipeline.run() for _ in range(count // batch_size))


def images_per_second(run: Callable[[], int]) -> float:
    """Return how many images a call makes in a second of processor time."""
    start = time.process_time()
    count = run()
    return count / (time.process_time() - start)


def measure(images: int = 128, batch_size: int = 32, rounds: int = 7) -> dict[str, float]:
    """Compare ways from files to batches; print a table.

    Args:
        images: Number of files.
        batch_size: Images in a batch.
        rounds: Rounds over which medians are taken, after one to warm up.

    Returns:
        For each way the median of its ratios to torchvision's reference.

    Raises:
        ArgumentError: If an argument is out of its range.
    """
    for name, value in {"images": images, "batch_size": batch_size, "rounds": rounds}.items():
        check_number(name, value, at_least=1, integer=True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, images)
        loader, data = ours(folder, batch_size)
        ways: dict[str, Callable[[], int]] = {
            "knlightning": partial(_count, loader),
            "knlightning, scaled by the same thread": lambda: sum(
                len(data.prepared(batch, train=True)) for batch, _ in loader
            ),
        }
        for key, other in references(folder, batch_size).items():
            ways[key] = partial(_count, other)
        if importlib.util.find_spec("nvidia.dali"):
            run = dali(folder, images, batch_size)
            ways["NVIDIA DALI on the CPU"] = lambda: _count(run())
        speeds = [{key: images_per_second(way) for key, way in ways.items()} for _ in range(rounds + 1)][1:]
    print(f"Images in a second of processor time; medians of {rounds} rounds of {images} images\n")
    print("| | images/s | ratio (range) |\n| --- | --- | --- |")
    ratios = {}
    for key in ways:
        paired = [speed[key] / speed[REFERENCE] for speed in speeds]
        ratios[key] = statistics.median(paired)
        middle = statistics.median(speed[key] for speed in speeds)
        print(f"| {key} | {middle:,.0f} | {ratios[key]:.2f} ({min(paired):.2f} to {max(paired):.2f}) |")
    return ratios


def _count(loader: Iterable[Any]) -> int:
    """Read all images, and count them."""
    return sum(len(labels) for _, labels in loader)


if __name__ == "__main__":
    command(measure, "python experiments/decoding.py")
