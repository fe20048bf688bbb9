"""Trial steps find what mixes samples, and tell a loss that is a sum from a mean."""

import pytest
import torch
from privacy.private_runs import SAMPLES, Net, naive, privacy, task, trainer
from standins import RandomData
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from knlightning.nn import KNConv2d
from knlightning.tasks import ClassificationTask, SegmentationTask


class SumLoss(ClassificationTask):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], reduction="sum")


def test_a_loss_that_is_a_sum_is_told_from_a_mean(tmp_path):
    data, module = RandomData(SAMPLES, 5), task()
    module.__class__ = SumLoss
    expected = naive(module, data.dataset, 5, 4)
    trainer(tmp_path, privacy(physical_batch_size=2), max_epochs=1).fit(module, data)
    torch.testing.assert_close(dict(module.backbone.state_dict()), expected, rtol=1e-3, atol=2e-4)


def test_a_loss_that_is_neither_is_refused(tmp_path):
    class Odd(ClassificationTask):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1]) / len(batch[1])

    module = task()
    module.__class__ = Odd
    with pytest.raises(ValueError, match=r"neither the mean nor the sum .* became 4 times as large"):
        trainer(tmp_path, privacy()).fit(module, RandomData(SAMPLES, 5))


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


class WeightedLoss(ClassificationTask):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], weight=batch[0].mean((0, 2, 3)).detach())


class Skipping(ClassificationTask):
    def training_step(self, batch, batch_idx):
        return None


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (HomeMadeBatchNorm(), r"backbone.1 \(HomeMadeBatchNorm\) does not treat each sample by itself.*changed sample"),
        (Counter(), r"backbone.1.average is a buffer that training samples change"),
    ],
)
def test_layers_that_mix_samples_are_found_by_trial(tmp_path, layer, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, privacy()).fit(task(Net(layer)), RandomData(SAMPLES, 5))


@pytest.mark.parametrize(("kind", "message"), [(WeightedLoss, "the loss does not treat"), (Skipping, "returned None")])
def test_losses_that_mix_samples_are_found_by_trial(tmp_path, kind, message):
    module = task()
    module.__class__ = kind
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, privacy()).fit(module, RandomData(SAMPLES, 5))


class Masks(RandomData):
    """Random images with a class for each pixel, of which some are to be ignored."""

    def __init__(self):
        super().__init__(SAMPLES, 5)
        labels = torch.randint(3, (SAMPLES, 8, 8), generator=torch.Generator().manual_seed(0))
        labels[:, :, 4:][torch.rand(SAMPLES, 8, 4, generator=torch.Generator().manual_seed(1)) < 0.5] = 255
        self.dataset = TensorDataset(self.dataset.tensors[0], labels)


def segmentation(loss_mean):
    torch.manual_seed(0)
    net = nn.Sequential(KNConv2d(3, 4, 3, 1, 1, dropout_p=0.0), nn.Mish(), nn.Conv2d(4, 3, 1))
    return SegmentationTask(net, optimizer=lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9), loss_mean=loss_mean)


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
