"""Trial steps find what mixes samples, and tell a loss that is a sum from a mean."""

import random

import numpy as np
import pytest
import torch
from privacy.private_runs import SAMPLES, Net, naive, privacy, task, trainer
from standins import RandomData
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchvision.ops import DropBlock2d

from knlightning.nn import KNConv2d
from knlightning.tasks import ClassificationTask, SegmentationTask


class SumLoss(ClassificationTask):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], reduction="sum")


def test_a_loss_that_is_a_sum_is_told_from_a_mean(tmp_path):
    data, module = RandomData(SAMPLES, 5), task(kind=SumLoss)
    expected = naive(module, data.dataset, 5, 4)
    trainer(tmp_path, privacy(physical_batch_size=2), max_epochs=1).fit(module, data)
    torch.testing.assert_close(dict(module.backbone.state_dict()), expected, rtol=1e-3, atol=2e-4)


def test_a_loss_that_is_neither_is_refused(tmp_path):
    class Odd(ClassificationTask):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1]) / len(batch[1])

    with pytest.raises(ValueError, match=r"neither the mean nor the sum .* became 1.78 times as large"):
        trainer(tmp_path, privacy()).fit(task(kind=Odd), RandomData(SAMPLES, 5))


class HomeMadeBatchNorm(nn.Module):
    def forward(self, x):
        return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x):
        self.average += x.detach().mean((0, 2, 3))
        return x


class SharedRows(nn.Module):
    """Makes a row for each sample of a parameter, and a mean of these."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.ones(1, 4, 1, 1))

    def forward(self, x):
        return x * self.shift.expand(len(x), -1, -1, -1).mean(0, keepdim=True)


class WeightedLoss(ClassificationTask):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], weight=batch[0].mean((0, 2, 3)).detach())


class WeightedBackward(ClassificationTask):
    def backward(self, loss):
        (loss / loss.detach()).backward()


class Skipping(ClassificationTask):
    def training_step(self, batch, batch_idx):
        return None


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (HomeMadeBatchNorm(), r"backbone.1 \(HomeMadeBatchNorm\) does not treat each sample by itself.*changed sample"),
        (SharedRows(), r"gradients of single samples at backbone.1.shift move with another sample"),
        (DropBlock2d(0.3, 1), r"backbone.1 \(DropBlock2d\) does not treat.*leaving out sample 3 of a batch changed"),
        (Counter(), r"backbone.1.average is a buffer that training samples change"),
    ],
)
def test_layers_that_mix_samples_are_found_by_trial(tmp_path, layer, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, privacy()).fit(task(Net(layer)), RandomData(SAMPLES, 5))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (WeightedLoss, "the loss does not treat"),
        (WeightedBackward, "the loss does not treat"),
        (Skipping, "returned None"),
    ],
)
def test_losses_that_mix_samples_are_found_by_trial(tmp_path, kind, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, privacy()).fit(task(kind=kind), RandomData(SAMPLES, 5))


class ClassWeights(ClassificationTask):
    """On the first samples, which all are of one class, the weights cancel out."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], weight=torch.tensor([1.0, 1.0, 9.0]))


class NamedIgnoredPixels(SegmentationTask):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], ignore_index=255)


class SometimesMixed(ClassificationTask):
    """Mixes at random, by a generator of its own choice; by torch's in test_what_breaks_privacy.py."""

    def training_step(self, batch, batch_idx):
        images = batch[0] if self.draw() > 0.3 else (batch[0] + batch[0].roll(1, 0)) / 2
        return F.cross_entropy(self(images), batch[1])


MIXING = "the loss does not treat each sample by itself"


def test_class_weights_are_found_on_data_sorted_by_class(tmp_path):
    data = RandomData(SAMPLES, 5)
    data.dataset.tensors[1].copy_(data.dataset.tensors[1].sort().values)
    with pytest.raises(ValueError, match=MIXING):
        trainer(tmp_path, privacy()).fit(task(kind=ClassWeights), data)


def test_an_ignore_index_is_found_where_the_first_samples_have_none(tmp_path):
    module, data = segmentation("image", NamedIgnoredPixels), Masks()
    data.dataset.tensors[1][data.dataset.tensors[1] == 255] = 0
    with pytest.raises(ValueError, match=MIXING):
        trainer(tmp_path, privacy()).fit(module, data)


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["random", "numpy"])
def test_mixing_by_chance_is_found(tmp_path, draw):
    kind = type("Drawn", (SometimesMixed,), {"draw": staticmethod(draw)})
    with pytest.raises(ValueError, match="does not treat each sample by itself"):
        trainer(tmp_path, privacy()).fit(task(kind=kind), RandomData(SAMPLES, 5))


def test_a_loss_without_a_gradient_is_refused(tmp_path):
    class Flat(ClassificationTask):
        def training_step(self, batch, batch_idx):
            return 0.0 * self(batch[0]).sum()

    with pytest.raises(ValueError, match="no gradient arrives at any layer in a trial step"):
        trainer(tmp_path, privacy()).fit(task(kind=Flat), RandomData(SAMPLES, 5))


class Plain(ClassificationTask):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Plain, "has the label -100, which the loss leaves out of its mean"), (ClassificationTask, "has the label -100")],
)
def test_the_label_that_cross_entropy_leaves_out_by_default(tmp_path, kind, message):
    """It may not be in the data."""
    module = task(kind=kind)
    trainer(tmp_path, privacy(), max_epochs=1).fit(module, RandomData(SAMPLES, 5))
    data = RandomData(SAMPLES, 5)
    data.dataset.tensors[1][10] = -100  # not among those of the trial steps
    run = trainer(tmp_path, privacy(), max_epochs=2)
    with pytest.raises(ValueError, match=message):
        run.fit(module, data)


def test_a_frozen_backbone_without_gradients_can_be_trained_on(tmp_path):
    class Features(ClassificationTask):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                features = nn.Sequential(*list(self.backbone)[:-1])(batch[0])
            return F.cross_entropy(self.backbone[-1](features), batch[1])

    module, callback = task(kind=Features), privacy()
    module.backbone[0].requires_grad_(False)
    trainer(tmp_path, callback, max_epochs=1).fit(module, RandomData(SAMPLES, 5))
    assert callback.ledger.history == [(0.8, 0.25, 4)]


class Masks(RandomData):
    """Random images with a class for each pixel, of which some are to be ignored."""

    def __init__(self):
        super().__init__(SAMPLES, 5)
        labels = torch.randint(3, (SAMPLES, 8, 8), generator=torch.Generator().manual_seed(0))
        labels[:, :, 4:][torch.rand(SAMPLES, 8, 4, generator=torch.Generator().manual_seed(1)) < 0.5] = 255
        self.dataset = TensorDataset(self.dataset.tensors[0], labels)


def segmentation(loss_mean, kind=SegmentationTask):
    net = nn.Sequential(KNConv2d(3, 4, 3, 1, 1, dropout_p=0.0), nn.Mish(), nn.Conv2d(4, 3, 1))
    return task(net, kind=kind, loss_mean=loss_mean)


def test_segmentation_is_private_with_a_loss_that_is_a_mean_for_each_image(tmp_path):
    module, data = segmentation("image"), Masks()

    def loss(net, image, label):
        return F.cross_entropy(net(image), label, ignore_index=255)

    expected = naive(module, data.dataset, 5, 4, loss=loss)
    trainer(tmp_path, privacy(physical_batch_size=2), max_epochs=1).fit(module, data)
    torch.testing.assert_close(dict(module.backbone.state_dict()), expected, rtol=1e-3, atol=2e-4)


def test_segmentation_with_a_mean_over_the_pixels_of_a_batch_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r'loss_mean="batch" divides .* set the task\'s loss_mean to "image"'):
        trainer(tmp_path, privacy()).fit(segmentation("batch"), Masks())
