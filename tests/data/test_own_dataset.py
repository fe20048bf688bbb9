"""A dataset of one's own takes one file, whose class a configuration names."""

import sys

import pytest
import standins
import torch
from jsonargparse import ArgumentError as ParserError
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from PIL import Image
from standins import TinyFCN

from knlightning.tasks import SegmentationTask

ROADS = """
from pathlib import Path

from torchvision.transforms import v2

from knlightning.data import MaskedFiles, SegmentationDataModule


class RoadsDataModule(SegmentationDataModule):
    class_names, label_ids, palette = ("ground", "road"), (0, 7), ((0, 0, 0), (128, 64, 128))
    mean, std, image_size = (0.48, 0.45, 0.40), (0.23, 0.22, 0.22), (24, 32)

    def __init__(self, root: str, **kwargs):
        super().__init__(**kwargs)
        self.root = Path(root)

    def load(self, split):
        images = sorted(self.root.glob(f"{split}/*.jpg"))
        masks = [path.with_suffix(".png") for path in images]
        augmentation = v2.Compose([v2.RandomCrop(16), v2.RandomHorizontalFlip()])
        return MaskedFiles(images, masks, {0: 0, 7: 1}, augmentation)
"""
CONFIG = """
data:
  class_path: roads.RoadsDataModule
  init_args:
    root: {root}
    batch_size: 2
    num_workers: 0
    scaling: standard
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        (tmp_path / split).mkdir()
        for number in range(count):
            Image.linear_gradient("L").resize((32, 24)).convert("RGB").save(tmp_path / split / f"{number}.jpg")
            Image.new("L", (32, 24), 7).save(tmp_path / split / f"{number}.png")
    (tmp_path / "roads.py").write_text(ROADS)
    monkeypatch.syspath_prepend(tmp_path)
    yield CONFIG.format(root=tmp_path)
    sys.modules.pop("roads", None)


def datamodule(config):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    return parser.instantiate(parser.parse_string(config)).data


def test_a_dataset_in_files_takes_one_file_and_a_config(config):
    data = datamodule(config)
    trainer = standins.trainer(None, max_epochs=1)
    task = SegmentationTask(TinyFCN(2))
    trainer.fit(task, datamodule=data)
    trainer.test(task, datamodule=data, verbose=False)
    assert trainer.global_step == 3
    assert [len(loader.dataset) for loader in (data.train_dataloader(), data.val_dataloader())] == [5, 2]
    assert len(data.test_dataloader().dataset) == 3
    assert dict(data.hparams)["root"] == str(data.root)
    assert dict(data.hparams)["val_split"] == 0


def test_it_augments_though_nothing_says_how_it_is_sampled(config):
    data = datamodule(config)
    data.setup("fit")
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        images, labels = zip(*loader, strict=True)
        assert [tuple(batch.shape) for batch in images] == [(2, 3, 16, 16), (2, 3, 16, 16), (1, 3, 16, 16)]
        assert all((batch == 1).all() for batch in labels)
        epochs.append(torch.cat(images))
    assert len({image.numpy().tobytes() for image in torch.cat(epochs)}) > 2  # all files are equal
    assert [tuple(images.shape) for images, _ in data.val_dataloader()] == [(2, 3, 24, 32)]


def test_a_misspelt_argument_is_refused(config):
    with pytest.raises(ParserError, match="batchsize"):
        datamodule(config.replace("batch_size", "batchsize"))
