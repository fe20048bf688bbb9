import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import timm
import torch
from nn import naive
from torch import nn

import knlightning
from knlightning.checks import ArgumentError
from knlightning.nn import Norm, make_norm
from knlightning.nn.normalization import NORM_TYPES, NORMS, PRIVATE_NORMS, mixes_samples


def over(*dims):
    def normalize(x):
        mean = x.mean(dims, keepdim=True)
        return (x - mean) / torch.sqrt((x - mean).square().mean(dims, keepdim=True) + 1e-5)

    return normalize


def in_groups(groups):
    return lambda x: over(2, 3, 4)(x.unflatten(1, (groups, -1))).flatten(1, 2)


EXPECTED = {
    "batch": over(0, 2, 3),
    "sync_batch": over(0, 2, 3),
    "layer": over(1, 2, 3),
    "group": in_groups(32),
    "instance": over(2, 3),
    "positional": naive.positional_norm,
    "local_context": lambda x: naive.local_context_norm(x, 2, (227, 227)),
    "none": lambda x: x,
}


@pytest.mark.parametrize("norm", EXPECTED)
def test_names_mean_what_they_say(norm):
    torch.manual_seed(0)
    x = torch.randn(2, 64, 3, 5, dtype=torch.float64) * torch.rand(2, 64, 1, 1, dtype=torch.float64) + 2
    layer = make_norm(norm, 64).double()
    torch.testing.assert_close(layer(x), EXPECTED[norm](x))
    assert {name: p.shape for name, p in layer.named_parameters()} == (
        {"weight": (64,), "bias": (64,)} if NORMS[norm].affine else {}
    )
    assert type(layer) in NORMS[norm].types or norm == "none"
    assert norm == "none" or make_norm(norm, 64, eps=0.5).eps == 0.5


@pytest.mark.parametrize("norm", EXPECTED)
def test_private_norms_are_those_that_treat_each_sample_by_itself(norm):
    torch.manual_seed(0)
    x = torch.randn(2, 64, 3, 5)
    layer = make_norm(norm, 64)
    alone = torch.equal(layer(x)[:1], layer(torch.cat((x[:1], 2 * x[1:])))[:1]) and not [*layer.buffers()]
    assert alone == (norm in PRIVATE_NORMS)


def test_every_name_is_tested():
    assert {*EXPECTED, "kernel"} == set(get_args(Norm)) == set(NORMS)
    assert get_args(Norm) == tuple(NORMS)


def test_channels_that_the_groups_do_not_divide():
    with pytest.raises(ArgumentError, match='channels must be a multiple of 32 for norm="group", got 48'):
        make_norm("group", 48)
    with pytest.raises(ValueError, match="groups must be a divisor of the number of channels, 5, got 2"):
        make_norm("local_context", 5)


def test_unknown_name_and_a_norm_without_a_layer():
    known = "batch, sync_batch, layer, group, instance, positional, local_context, none"
    with pytest.raises(ArgumentError, match=f"norm must be one of {known}, got 'layers'$"):
        make_norm("layers", 8)
    with pytest.raises(ArgumentError, match=f"norm must be one of {known}, got 'kernel'. .* KNConv2d"):
        make_norm("kernel", 8)


def test_types_are_those_of_layers_that_normalize():
    assert nn.Identity not in NORM_TYPES
    assert len(set(NORM_TYPES)) == len(NORM_TYPES)


LAYER = '''
import torch
from torch import Tensor, nn


class RootMeanSquare(nn.Module):
    """Divide each position by the root of the mean square of its channels, then scale and shift."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels)), eps

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + self.eps)
        return x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
'''
IMPORT = "from knlightning.nn.positional import PositionalNorm2d\n"
FIRST = "    for spec in (\n"
USES = """
import typing
import torch
from torch import nn
from knlightning.models import kernel_normalize, resnet8
from knlightning.nn.root_mean_square import RootMeanSquare
from knlightning.privacy.per_sample import PerSampleGradients
from knlightning.privacy.rules import check_rules
from knlightning.tasks.optimizer_settings import parameter_groups

assert "root_mean_square" in typing.get_args(typing.get_type_hints(resnet8)["norm"])
net = resnet8(norm="root_mean_square").double()
layers = [m for m in net.modules() if isinstance(m, RootMeanSquare)]
assert len(layers) == 7

_, norms = parameter_groups(net, 0.0, None)
assert norms["params"] == [p for layer in layers for p in layer.parameters()]

converted, report = kernel_normalize(net)
assert len(report.norms) == 7 and not any(isinstance(m, RootMeanSquare) for m in converted.modules())

assert check_rules(net) == []
torch.manual_seed(0)
for p in net.parameters():
    nn.init.normal_(p, std=0.1)
x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
expected = []
for image in x:
    grads = torch.autograd.grad(net(image[None]).square().sum(), list(net.parameters()))
    expected.append(torch.cat([g.flatten() for g in grads]).norm())
gradients = PerSampleGradients(net, "sum")
gradients.attach()
net(x).square().sum().backward()
torch.testing.assert_close(gradients.norms().double(), torch.stack(expected), rtol=1e-5, atol=0)
"""


@pytest.mark.parametrize(
    ("layer", "mixes"),
    [
        (nn.BatchNorm1d(4, track_running_stats=False), True),
        (nn.LazyBatchNorm2d(), True),
        (timm.layers.BatchNormAct2d(4), True),
        (timm.layers.EvoNorm2dB0(4), True),
        (nn.InstanceNorm2d(4, track_running_stats=True), True),
        (nn.InstanceNorm2d(4), False),
        (timm.layers.EvoNorm2dS0(4), False),
        (timm.layers.FrozenBatchNormAct2d(4), False),
        (nn.Sequential(nn.BatchNorm2d(4)), False),  # itself
    ],
)
def test_layers_that_mix_samples(layer, mixes):
    assert mixes_samples(layer) is mixes


@pytest.mark.slow
def test_a_new_norm_takes_its_layer_and_a_row_of_the_table(tmp_path):
    """Everything else follows: configurations, weight decay, conversion, and exact private training."""
    package = tmp_path / "knlightning"
    shutil.copytree(Path(knlightning.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "nn" / "root_mean_square.py").write_text(LAYER)
    table = package / "nn" / "normalization.py"
    text = table.read_text()
    assert text.count(IMPORT) == text.count(FIRST) == 1
    text = text.replace(IMPORT, f"{IMPORT}from knlightning.nn.root_mean_square import RootMeanSquare\n")
    row = 'NormSpec("root_mean_square", "Over the channels.", RootMeanSquare, (RootMeanSquare,)),'
    table.write_text(text.replace(FIRST, f"{FIRST}        {row}\n"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", USES], check=True, env=environment, cwd=tmp_path)
