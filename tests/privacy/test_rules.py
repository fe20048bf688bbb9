import pytest
import torch
from torch import nn

from knlightning.models import list_models
from knlightning.privacy import check_rules


@pytest.mark.parametrize(
    ("layer", "problem"),
    [
        (
            nn.BatchNorm2d(3),
            r"0 \(BatchNorm2d\): there is no rule .* Freeze its parameters, or use one of Conv1d, Conv2d",
        ),
        (nn.GRU(3, 3), r"0 \(GRU\): there is no rule"),
        (
            nn.Embedding(3, 3, scale_grad_by_freq=True),
            r"0 \(Embedding\): .* Leave out max_norm, scale_grad_by_freq and",
        ),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), r"0 \(MultiheadAttention\): .* Leave out add_bias_kv"),
        (nn.InstanceNorm2d(3, affine=True, track_running_stats=True), r"0 \(InstanceNorm2d\): running statistics mix"),
    ],
)
def test_layers_without_a_rule(layer, problem):
    (found,) = check_rules(nn.Sequential(layer))
    with pytest.raises(ValueError, match=problem):
        raise ValueError(found)
    assert check_rules(nn.Sequential(layer.requires_grad_(False))) == []


def test_networks_and_norms_have_rules():
    for model in list_models():
        norms = ("kernel", "layer", "instance", "positional", "none") if model.name == "resnet8" else ("kernel",)
        for norm in norms if model.norm else (None,):
            with torch.device("meta"):  # without values
                net = model.make(norm=norm) if norm else model.make()
            assert check_rules(net) == [], (model.name, norm)
