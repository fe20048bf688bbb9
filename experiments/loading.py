"""Measure how fast small images come to the device, beside torchvision's dataset with transforms of single images.

    python experiments/loading.py

Both read the same random images, in the format of CIFAR-100, and give shuffled batches on the device: cropped at
random after padding by 4 pixels, mirrored with probability 1/2, scaled to 0 to 1. They run one after the other, so
that a machine that becomes slower slows both; ratios are taken within a round. The datamodule starts no processes for
images in memory, whatever `num_workers` is: that is part of its speed.
"""

import pickle
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import CIFAR100

from knlightning.analysis.measure import Device, choose_device
from knlightning.checks import check, check_number
from knlightning.commands.command import command
from knlightning.data import CIFAR100DataModule

WORKERS = (0, 2)


class UnverifiedCIFAR100(CIFAR100):
    """torchvision's dataset for files of any content."""

    train_list = [[name, None] for name, _ in CIFAR100.train_list]  # noqa: RUF012 # as in the base
    test_list = [[name, None] for name, _ in CIFAR100.test_list]  # noqa: RUF012 # as in the base
    meta = {**CIFAR100.meta, "md5": None}  # noqa: RUF012 # as in the base


def write_images(root: Path, images: np.ndarray) -> None:
    """Write training images in the format of CIFAR-100; the first of them for testing.

    Args:
        root: Folder in which the dataset's own is made.
        images: Uint8 (N, 3, 32, 32).
    """
    folder = root / CIFAR100.base_folder
    folder.mkdir()
    for name, part in (("train", images), ("test", images[:1])):
        content = {"data": part.reshape(-1, 3072), "fine_labels": [number % 100 for number in range(len(part))]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    names = [f"class {number}" for number in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}, protocol=2))


class WholeBatches:
    """Epochs of the datamodule: batches cut from one tensor, varied at once on the device.

    Args:
        root: Folder in which the dataset's own lies.
        batch_size: Images in a batch.
        num_workers: Processes that load.
        device: To which batches go.
    """

    def __init__(self, root: Path, batch_size: int, num_workers: int, device: str) -> None:
        self.data = CIFAR100DataModule(
            root, batch_size=batch_size, num_workers=num_workers, pin_memory=device == "cuda"
        )
        self.data.setup("fit")
        self.loader, self.device = self.data.train_dataloader(), device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.loader:
            yield self.data.prepared(images.to(self.device), train=True), labels.to(self.device)


class SingleImages:
    """Epochs of torchvision's dataset: every image is varied by itself where it is read.

    Arguments are those of `WholeBatches`.
    """

    def __init__(self, root: Path, batch_size: int, num_workers: int, device: str) -> None:
        transform = transforms.Compose(  # faster than their successors of version 2
            [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        )
        self.loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
            UnverifiedCIFAR100(str(root), transform=transform),
            batch_size,
            shuffle=True,
            num_workers=num_workers,
            pin_memory=device == "cuda",
            persistent_workers=num_workers > 0,
        )
        self.device = device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.loader:
            yield images.to(self.device), labels.to(self.device)


def images_per_second(batches: Iterable[tuple[Tensor, Tensor]], device: str) -> float:
    """Time an epoch.

    Args:
        batches: The epoch.
        device: On which they are.
    """
    start = time.perf_counter()
    count = sum(len(labels) for _, labels in batches)
    if device == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - start)


def measure(
    num_workers: tuple[int, ...] = WORKERS,
    batch_size: int = 256,
    images: int = 50_000,
    rounds: int = 5,
    device: Device = "auto",
) -> dict[int, float]:
    """Compare the two ways of loading small images; print a table.

    Args:
        num_workers: Values of this argument that both are given; each is a row of the table.
        batch_size: Images in a batch.
        images: Number of images, each seen once a round.
        rounds: Rounds over which medians are taken, after one to warm up.
        device: Where batches go; auto for a GPU if there is one.

    Returns:
        For each number of processes the median of the ratios.

    Raises:
        ArgumentError: If an argument is out of its range.
    """
    check(bool(num_workers) and min(num_workers) >= 0, "num_workers", num_workers, "a list of numbers of at least 0")
    check_number("batch_size", batch_size, at_least=1, integer=True)
    check_number("images", images, at_least=1, integer=True)
    check_number("rounds", rounds, at_least=1, integer=True)
    device = choose_device(device)
    ratios = {}
    print(f"Images a second on {device}, batches of {batch_size}; medians of {rounds} rounds of {images} images\n")
    print("| num_workers | knlightning | torchvision | ratio (range) |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), np.random.default_rng(0).integers(0, 256, (images, 3, 32, 32), np.uint8))
        for workers in num_workers:
            pipelines = [kind(Path(folder), batch_size, workers, device) for kind in (WholeBatches, SingleImages)]
            speeds = [[images_per_second(p, device) for p in pipelines] for _ in range(rounds + 1)][1:]
            paired = [ours / theirs for ours, theirs in speeds]
            ours, theirs = (statistics.median(column) for column in zip(*speeds, strict=True))
            ratios[workers] = statistics.median(paired)
            spread = f"{min(paired):.1f} to {max(paired):.1f}"
            print(f"| {workers} | {ours:,.0f} | {theirs:,.0f} | {ratios[workers]:.1f} ({spread}) |", flush=True)
    return ratios


if __name__ == "__main__":
    command(measure, "python experiments/loading.py")
