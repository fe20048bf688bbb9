"""Small networks and data that stand in for the real ones where a test is about something else."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from knlightning.data.samplers import EvalSampler, TrainSampler

TESTS = Path(__file__).parent
PROJECT = TESTS.parent


class TinyNet(nn.Module):
    """A perceptron with dropout on the average colours of 4x4 fields."""

    def __init__(self, num_classes=10, dropout_p=0.2):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.dropout = nn.Dropout(dropout_p)
        self.head = nn.Linear(48, num_classes)

    def forward(self, images):
        return self.head(self.dropout(self.pool(images).flatten(1)))


class RandomData(LightningDataModule):
    """A datamodule as a user may write it: float images, plain loaders, none of the attributes of ours."""

    def __init__(self, samples=10, batch_size=4, classes=3):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(samples, 3, 8, 8, generator=generator)
        labels = torch.randint(classes, (samples,), generator=generator)
        self.dataset = TensorDataset(images, labels)
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(self.dataset, self.batch_size, generator=torch.Generator())

    def val_dataloader(self):
        return DataLoader(self.dataset, self.batch_size)

    def test_dataloader(self):
        return DataLoader(self.dataset, self.batch_size)


class TinyFCN(nn.Module):
    """A convolution with dropout, to logits for every pixel."""

    def __init__(self, num_classes=3, dropout_p=0.2):
        super().__init__()
        self.dropout = nn.Dropout(dropout_p)
        self.head = nn.Conv2d(3, num_classes, 3, padding=1)

    def forward(self, images):
        return self.head(self.dropout(images))


class RandomScenes(LightningDataModule):
    """Random images with random labels of their pixels, some ignored; none of the attributes of our datamodules."""

    def __init__(self, samples=10, batch_size=4, classes=3, size=(8, 10)):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(samples, 3, *size, generator=generator)
        self.labels = torch.randint(classes, (samples, *size), generator=generator)
        self.labels[torch.rand(self.labels.shape, generator=generator) < 0.3] = 255
        self.dataset = TensorDataset(self.images, self.labels)
        self.batch_size = batch_size

    def _loader(self, dataset, **kwargs):
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        kwargs.setdefault("sampler", EvalSampler(len(dataset), ranks, rank))
        return DataLoader(dataset, batch_size=self.batch_size, **kwargs)

    def train_dataloader(self):
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = TrainSampler(len(self.dataset), 0, ranks, rank)
        return self._loader(self.dataset, sampler=sampler, generator=torch.Generator())

    def val_dataloader(self):
        return self._loader(self.dataset)

    def test_dataloader(self):
        return self._loader(self.dataset)

    def predict_dataloader(self):
        names = [f"{number}.jpg" for number in range(len(self.images))]
        return self._loader(list(zip(self.images, names, strict=True)))


def trainer(root, *callbacks, **settings):
    """A trainer on one CPU that shows nothing, and writes nothing by itself."""
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    where = {"accelerator": "cpu", "devices": 1, "default_root_dir": root}
    return Trainer(callbacks=list(callbacks), **(silent | where | settings))


def tiny_config(**trainer):
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
        "pictures": {"every_n_epochs": 0},  # they take longer than the training
        "trainer": {
            "max_epochs": 3,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **trainer,
        },
    }


def write_config(path, config):
    path.write_text(yaml.safe_dump(config))
    return str(path)


def knl(*args, cwd, **env):
    """Start the command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "knlightning.commands.main", *args],
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
        # a shell has its background jobs ignore interrupts, and what they start ignores them too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
"""Options of two processes on the CPU."""


def finished(process):
    """Wait for the command, and return what it has printed."""
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def run(*args, cwd):
    """Run the command in a process of its own, and return what it has printed."""
    return finished(knl(*args, cwd=cwd))


def scores(directory):
    """Return what `knl test` has stored of a run, without the means over classes."""
    stored = json.loads((directory / "test" / "test.json").read_text())["scores"]
    return {name: value for name, value in stored.items() if name.startswith("test/") and not name.endswith("_mean")}


def weights(checkpoint):
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def assert_same_weights(one, other):
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{one} and {other} differ in {different}"


class Malicious:
    """What calls a function when it is unpickled."""

    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


def encoded(image, kind="PNG", **options):
    """Return the bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_cifar100(root, train=24, test=7):
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


def write_cifar10(root, images=6):
    """Write files in the format of CIFAR-10, with few images each."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        data = generator.integers(0, 256, (images, 3072), np.uint8)
        content = {"data": data, "labels": generator.integers(0, 10, images).tolist()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    names = [f"class {number}" for number in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, protocol=2))


def write_imagenet(root, classes=1000, size=(8, 8)):
    """Write folders in the layout of ImageNet, with one image of (width, height) `size` for each class and split."""
    content = encoded(Image.new("RGB", size, "orange"), "JPEG")
    for split in ("train", "val"):
        for number in range(classes):
            wnid = f"n{number + 1440764:08d}"
            (root / split / wnid).mkdir(parents=True)
            (root / split / wnid / f"{wnid}_{split}.JPEG").write_bytes(content)


def write_image_folder(root, classes=("cat", "dog"), count=3, size=(40, 30)):
    """Write images of random pixels, `count` of each class into ROOT/train and as many into ROOT/val."""
    generator = np.random.default_rng(0)
    width, height = size
    for part in ("train", "val"):
        for name in classes:
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (height, width, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")


def write_parquet(folder, splits=("train", "validation")):
    """Write a Parquet file of the training and one of the test images of the digits, as files of the Hub are."""
    import pyarrow as pa
    from pyarrow import parquet

    from knlightning.data import DigitsDataModule

    folder.mkdir(parents=True)
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list("0123456789")}}
    for name, train in zip(splits, (True, False), strict=True):
        images, labels = DigitsDataModule().read(train)
        rows = []
        for number, image in enumerate(images):
            content = encoded(Image.fromarray(image.permute(1, 2, 0).numpy()), compress_level=1)
            rows.append({"bytes": content, "path": f"{number}.png"})
        table = pa.table({"image": rows, "label": labels.numpy()})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        parquet.write_table(table, folder / f"{name}-00000-of-00001.parquet")


def write_imagenet32(root, pickles=False, rows=5, val=7):
    """Write files in the formats of ImageNet 32x32, with few rows in each; return the arrays by the files' names."""
    generator = np.random.default_rng(0)
    contents = {}
    for part, names, count in (
        ("train", [f"train_data_batch_{number}" for number in range(1, 11)], rows),
        ("val", ["val_data"], val),
    ):
        folder = root if pickles else root / f"Imagenet32_{part}_npz"
        folder.mkdir(parents=True, exist_ok=True)
        for place, name in enumerate(names):
            content = {
                "data": generator.integers(0, 256, (count, 3072), np.uint8),
                "labels": (place * count + np.arange(count)) * 7 % 1000 + 1,  # all 1000 in turn
            }
            contents[name] = content
            if pickles:
                listed = content | {"labels": content["labels"].tolist()}
                (folder / name).write_bytes(pickle.dumps(listed, protocol=2))
            else:
                np.savez(folder / f"{name}.npz", mean=np.zeros(3072), **content)
    return contents


def write_cityscapes(root, train=3, val=3, test=2, size=(64, 32)):
    """Write images of (width, height) `size`, and their label ids, in the layout of Cityscapes.

    There are two cities in each split, of as many images as the arguments say. Fields of 4x4 pixels have the same id;
    all ids occur. In an image red is 7 times the id (245 for 255), green and blue are random. As in the real data, all
    pixels of test images are of id 0 in the label files.
    """
    generator = np.random.default_rng(0)
    width, height = size
    fields = -(-height // 4), -(-width // 4)
    for split, cities, count in (("train", "ba", train), ("val", "dc", val), ("test", "fe", test)):
        for city in cities:
            images, masks = (root / kind / split / city for kind in ("leftImg8bit", "gtFine"))
            images.mkdir(parents=True)
            masks.mkdir(parents=True)
            for number in range(count):
                ids = generator.permutation(np.resize(np.r_[:34, 255], fields[0] * fields[1])).astype(np.uint8)
                ids = ids.reshape(fields).repeat(4, 0).repeat(4, 1)[:height, :width]
                pixels = generator.integers(0, 256, (height, width, 3), np.uint8)
                pixels[..., 0] = np.minimum(ids, 35) * 7
                name = f"{city}_{number:06d}_000019"
                Image.fromarray(pixels).save(images / f"{name}_leftImg8bit.png")
                ids = ids * np.uint8(split != "test")
                Image.fromarray(ids).save(masks / f"{name}_gtFine_labelIds.png")


def mapping(address):
    """Return the file that is mapped at an address of this process ("" for none), and how many bytes are its own.

    Bytes are a process's own once it has written to them.
    """
    inside, file, private = False, "", 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = line.split(maxsplit=5)
        if not key.endswith(":"):
            start, end = (int(place, 16) for place in key.split("-"))
            inside = start <= address < end
            if inside:
                file = values[4] if len(values) > 4 else ""
        elif inside and key == "Private_Dirty:":
            private = int(values[0]) * 1024
    return file, private


class Interrupt(Callback):
    """Ends a run as Ctrl-C does, once it has taken some steps."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


class Stop(Callback):
    """Ends a run after a batch of the run, counted from 1, as early stopping and max_time do."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx + 1 == self.batch:
            trainer.should_stop = True


class Signal(Callback):
    """Sends a signal to its own process, once the run has taken some steps."""

    def __init__(self, step, signum):
        self.step, self.signum = step, signum

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.signum)
