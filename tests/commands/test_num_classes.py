import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from torch import nn

from knlightning.commands.num_classes import take_from_data
from knlightning.data import DigitsDataModule, ImageFolderDataModule


class Task:
    def __init__(self, backbone: nn.Module):
        self.backbone = backbone


@pytest.fixture
def parser():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Task, "model")
    parser.add_subclass_arguments(LightningDataModule, "data", required=False)
    return parser


def classes(parser, *args):
    config = parser.parse_args([f"--model={__name__}.Task", *args])
    take_from_data(parser, config)
    return config.model.init_args.backbone.get("init_args", {}).get("num_classes")


DIGITS = f"--data={DigitsDataModule.__module__}.DigitsDataModule"
RESNET = "--model.backbone=knlightning.models.resnet18"


def test_they_follow_from_the_data(parser):
    assert classes(parser, RESNET, DIGITS) == 10
    assert classes(parser, "--model.backbone=torchvision.models.resnet18", DIGITS) == 10
    assert classes(parser, "--model.backbone=knlightning.models.converted", "--model.backbone.name=a.b", DIGITS) == 10


def test_a_number_that_is_given_stays(parser):
    for backbone in (RESNET, "--model.backbone=torchvision.models.resnet18"):
        assert classes(parser, backbone, "--model.backbone.num_classes=7", DIGITS) == 7


def test_without_data_the_default_stays(parser):
    assert classes(parser, RESNET) == 1000


def test_a_network_without_this_argument_stays_as_it_is(parser):
    assert classes(parser, "--model.backbone=torch.nn.Identity", DIGITS) is None


def test_folders_are_counted(parser, tmp_path):
    data = f"--data={ImageFolderDataModule.__module__}.ImageFolderDataModule"
    assert classes(parser, RESNET, data, f"--data.root={tmp_path}") == 1000
    for name in ("cat", "dog", ".hidden"):
        (tmp_path / "train" / name).mkdir(parents=True)
    assert classes(parser, RESNET, data, f"--data.root={tmp_path}") == 2
