"""Small networks and data that stand in for the real ones where a test is about something else."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

TESTS = Path(__file__).parent
PROJECT = TESTS.parent


class TinyNet(nn.Module):
    """A perceptron with dropout on the average colours of 4x4 fields."""

    def __init__(self, num_classes: int = 10, dropout_p: float = 0.2) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.dropout = nn.Dropout(dropout_p)
        self.head = nn.Linear(48, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.pool(images).flatten(1)))


class RandomData(LightningDataModule):
    """A datamodule as a user may write it: float images, plain loaders, none of the attributes of ours."""

    def __init__(self, samples: int = 10, batch_size: int = 4, classes: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(samples, 3, 8, 8, generator=generator)
        labels = torch.randint(classes, (samples,), generator=generator)
        self.dataset = TensorDataset(images, labels)
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, self.batch_size, generator=torch.Generator())

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, self.batch_size)


def tiny_config(**trainer: object) -> dict:
    """A configuration that learns the digits in seconds."""
    return {
        "seed_everything": 3,
        "model": {
            "class_path": "knlightning.tasks.ClassificationTask",
            "init_args": {
                "backbone": {"class_path": "standins.TinyNet"},
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5, "momentum": 0.9}},
                "lr_scheduler": {"class_path": "knlightning.tasks.CosineLR", "init_args": {"final": 0.01}},
            },
        },
        "data": {"class_path": "knlightning.data.DigitsDataModule", "init_args": {"batch_size": 64}},
        "trainer": {
            "max_epochs": 3,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **trainer,
        },
    }


def write_config(path: Path, config: dict) -> str:
    path.write_text(yaml.safe_dump(config))
    return str(path)


def knl(*args: str, cwd: Path, **env: str) -> subprocess.Popen[str]:
    """Start the command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "knlightning.cli", *args],
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": f"{PROJECT}{os.pathsep}{TESTS}",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            **env,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def weights(checkpoint: Path) -> dict[str, Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{one} and {other} differ in {different}"


def write_cifar100(root: Path, train: int = 24, test: int = 7) -> None:
    """Write files in the format of CIFAR-100, with few images."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, count in (("train", train), ("test", test)):
        images = generator.integers(0, 256, (count, 3072), np.uint8)
        labels = generator.integers(0, 100, count).tolist()
        (folder / name).write_bytes(pickle.dumps({"data": images, "fine_labels": labels}, protocol=2))
    names = [f"class {number}" for number in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}, protocol=2))


class Interrupt(Callback):
    """Ends a run as Ctrl-C does, once it has taken some steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt
