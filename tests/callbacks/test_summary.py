import pytest
import torch
from lightning.pytorch import LightningModule
from standins import RandomData, TinyNet, trainer
from torch import nn

from knlightning.callbacks.summary import Summary, count_flops
from knlightning.data import DigitsDataModule
from knlightning.models import resnet8
from knlightning.nn import KNConv2d
from knlightning.tasks import ClassificationTask


def test_three_lines_and_how_the_network_was_converted(capsys):
    backbone = {"class_path": "knlightning.models.converted", "init_args": {"name": "a.resnet", "norm": "kernel"}}
    summary = Summary({"model": {"class_path": "x.Task", "init_args": {"backbone": backbone}}})
    few = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1, "accumulate_grad_batches": 2}
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 10))
    network[0].bias.requires_grad_(False)
    network.conversion = "Kernel normalized: all."
    task = ClassificationTask(network, freeze="0", thaw_epoch=3)
    trainer(None, summary, **few).fit(task, DigitsDataModule(batch_size=4, val_split=0.2))
    lines = capsys.readouterr().out.splitlines()
    conv, linear = 2 * 30 * 30 * 2 * 27, 2 * 20
    assert conv + linear == 97240
    assert lines == [
        "Network: a.resnet with kernel normalization, 86 parameters (84 trained), 97.2 k FLOPs an image",
        "         Kernel normalized: all.",
        "Frozen:  1 tensor before epoch 3, which this run does not reach",
        "Data:    DigitsDataModule, 1,149 training images, 288 for validation, 10 classes, 32x32",
        "Run:     1 epoch, 1 step an epoch, CPU, precision 32-true",
    ]


def test_modules_and_loaders_of_users(capsys):
    class Plain(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = TinyNet(3)

        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = RandomData(samples=8, batch_size=4)
    trainer(None, Summary({}), max_steps=2).fit(Plain(), data.train_dataloader())
    network, loader, run = capsys.readouterr().out.splitlines()
    assert network.startswith("Network: Plain, ")
    assert loader == "Data:    loaders of your own, 8 training images"
    assert run.startswith("Run:     no limit of epochs, 2 steps an epoch, at most 2 steps, ")


@pytest.mark.parametrize("norm", ["none", "kernel"])
def test_operations_of_kernel_normalization_are_those_of_the_convolutions(norm):
    network = resnet8(num_classes=10, norm=norm, low_resolution=False)
    assert count_flops(network, (3, 32, 32)) == pytest.approx(42.6e6, rel=0.02)


def test_counting_leaves_network_and_random_numbers_as_they_are():
    layer = KNConv2d(3, 4, 3, dropout_p=0.5)
    layer.train()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert count_flops(layer, (3, 8, 8)) == 2 * 6 * 6 * 4 * 27
    assert layer.training
    assert torch.equal(before, torch.get_rng_state())


def test_images_that_do_not_fit_are_not_counted():
    assert count_flops(nn.Conv2d(3, 4, 9), (3, 8, 8)) is None
