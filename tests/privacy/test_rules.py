import pytest
import torch
from torch import nn

from knlightning import models
from knlightning.privacy import check_rules


class OwnConv(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    ("layer", "problem"),
    [
        (
            nn.BatchNorm2d(3),
            r"0 \(BatchNorm2d\): there is no rule .* Freeze its parameters, or use one of CNBlock, Conv1d",
        ),
        (OwnConv(3, 3, 1), r"0 \(OwnConv\): there is no rule"),
        (nn.Conv2d(3, 3, 1, padding_mode="reflect"), r'0 \(Conv2d\): there is no rule for padding_mode="reflect"'),
        (nn.InstanceNorm2d(3, affine=True, track_running_stats=True), r"0 \(InstanceNorm2d\): running statistics mix"),
    ],
)
def test_layers_without_a_rule(layer, problem):
    (found,) = check_rules(nn.Sequential(layer))
    with pytest.raises(ValueError, match=problem):
        raise ValueError(found)
    assert check_rules(nn.Sequential(layer.requires_grad_(False))) == []


@pytest.mark.parametrize("name", [name for name in models.__all__ if "resne" in name.lower() and name != "KNResNet"])
def test_backbones_have_rules(name):
    for norm in ("kernel", "layer", "instance", "positional", "none"):
        with torch.device("meta"):  # without values
            net = getattr(models, name)(3, norm=norm)
        assert check_rules(net) == []


@pytest.mark.parametrize("name", ["convnext_tiny", "knconvnext_tiny"])
def test_convnexts_have_rules(name):
    with torch.device("meta"):
        net = getattr(models, name)(3)
    assert check_rules(net) == []
