import pytest
import torch

from knlightning.checks import ArgumentError
from knlightning.data import DigitScenesDataModule, DigitsDataModule, batches


def test_batches_are_ready_for_the_network():
    data = DigitsDataModule(batch_size=64, scaling="standard", augment=False)
    images, labels = next(batches(data, "train", epoch=3))
    loader = data.train_dataloader()
    loader.sampler.set_epoch(3)
    raw, expected = next(iter(loader))
    assert torch.equal(images, data.prepared(raw, train=True))
    assert torch.equal(labels, expected)
    assert images.dtype == torch.float32
    assert not torch.equal(next(batches(data, "train"))[1], labels)  # another epoch, another order
    assert sum(len(labels) for _, labels in batches(data, "test")) == 360


def test_training_images_alone_are_augmented(monkeypatch):
    data = DigitsDataModule()
    monkeypatch.setattr(data, "augmentation", torch.zeros_like)
    assert not next(batches(data, "train"))[0].any()
    assert next(batches(data, "val"))[0].any()


def test_labels_of_pixels_are_whole_numbers_as_losses_take_them():
    data = DigitScenesDataModule(batch_size=2, train_scenes=2, eval_scenes=2)
    assert next(batches(data, "test"))[1].dtype == torch.int64


def test_other_splits_are_refused():
    with pytest.raises(ArgumentError, match="split must be"):
        next(batches(DigitsDataModule(), "all"))
