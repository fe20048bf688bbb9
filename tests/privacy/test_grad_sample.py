import copy
import subprocess
import sys

import pytest
import torch
from opacus import PrivacyEngine
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from opacus.utils.per_sample_gradients_utils import (
    check_per_sample_gradients_are_correct,
    compute_microbatch_grad_sample,
    compute_opacus_grad_sample,
)
from privacy.micro_batches import Masks, loss_with, micro_batches, norms_of
from standins import PROJECT
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.convnext import CNBlock, LayerNorm2d

from knlightning import models
from knlightning.models.knresnet import BasicBlock
from knlightning.models.layers import Layers, Options
from knlightning.nn import GroupKNConv2d, KNConv1d, KNConv2d, KNConv3d, LocalContextNorm2d, PositionalNorm2d
from knlightning.privacy import register_opacus_rules, watch_statistics

# torch tells so of the first layer, whose images need no gradient
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")

LAYERS = [  # one of each type; test_per_sample.py has them in all shapes
    (KNConv1d(4, 6, 3, 2, 1, groups=2, dropout_p=0.0), (4, 7)),
    (KNConv2d(3, 4, 3, padding="same", dropout_p=0.0, dilation=2, padding_mode="reflect"), (3, 5, 6)),
    (KNConv3d(2, 3, 2, dropout_p=0.0), (2, 3, 4, 5)),
    (GroupKNConv2d(4, 2, 3, groups=2, dropout_p=0.0), (4, 5, 6)),
    (nn.Conv1d(4, 6, 3, 2, 1, groups=2), (4, 7)),
    (nn.Conv2d(4, 6, 3, dilation=2, padding=2, groups=2, bias=False, padding_mode="circular"), (4, 5, 6)),
    (nn.Conv3d(2, 3, 2), (2, 3, 4, 5)),
    (nn.Linear(5, 3), (5,)),
    (nn.Linear(5, 3), (2, 3, 5)),
    (nn.GroupNorm(2, 4), (4, 5, 6)),
    (nn.LayerNorm(6), (4, 5, 6)),
    (nn.InstanceNorm2d(4, affine=True), (4, 5, 6)),
    (LocalContextNorm2d(4, window=3), (4, 5, 6)),
    (PositionalNorm2d(4), (4, 5, 6)),
    (LayerNorm2d(4), (4, 5, 6)),
    (BasicBlock(4, 6, Layers(Options(dropout_p=0.0))), (4, 5, 6)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: str(v) if isinstance(v, tuple) else type(v).__name__)
def test_opacus_own_check_of_layers(layer, shape):
    torch.manual_seed(0)
    x = torch.randn(3, *shape)
    handles = watch_statistics(layer)
    assert check_per_sample_gradients_are_correct(x, layer, atol=1e-5)
    if not isinstance(layer, nn.InstanceNorm2d | GroupKNConv2d):  # for which torch takes no empty batches, or warns
        for name, samples in compute_opacus_grad_sample(x[:0], layer).items():
            assert samples.shape == (0, *layer.get_parameter(name).shape)
    for handle in handles:
        handle.remove()


def test_opacus_own_check_of_a_network():
    """With all layers at once."""
    torch.manual_seed(0)
    net = models.resnet8(num_classes=3, norm="kernel", dropout_p=0.0).double()
    watch_statistics(net)
    assert check_per_sample_gradients_are_correct(torch.rand(2, 3, 8, 9, dtype=torch.float64), net)


IMPORT_ALONE = """
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping

tables = GradSampleModule.GRAD_SAMPLERS, GradSampleModuleFastGradientClipping.NORM_SAMPLERS
before = [dict(table) for table in tables]
import knlightning.privacy, knlightning.privacy.audit
assert [dict(table) for table in tables] == before, "importing knlightning.privacy changes Opacus' rules"
knlightning.privacy.register_opacus_rules()
from torch import nn
from knlightning.nn import KNConv2d
for table, known in zip(tables, before):
    assert KNConv2d in table and table[nn.Conv2d] != known.get(nn.Conv2d)
"""


@pytest.mark.slow
def test_importing_the_package_leaves_opacus_as_it_is():
    subprocess.run([sys.executable, "-c", IMPORT_ALONE], check=True, cwd=PROJECT)


@pytest.mark.filterwarnings("ignore:Secure RNG turned off:UserWarning", "ignore:Optimal order is the largest")
def test_opacus_privacy_engine_takes_one_call():
    torch.manual_seed(0)
    net = nn.Sequential(KNConv2d(3, 4, 3, dropout_p=0.0), nn.Mish(), nn.Flatten(), nn.Linear(36, 2)).double()
    x, expected = torch.rand(6, 3, 5, 5, dtype=torch.float64), copy.deepcopy(net)
    expected(x).square().sum(1).mean().backward()
    watch_statistics(net)
    engine = PrivacyEngine(accountant="rdp")
    private, optimizer, loader = engine.make_private(
        module=net, optimizer=torch.optim.SGD(net.parameters(), lr=1.0), data_loader=DataLoader(TensorDataset(x), 6),
        noise_multiplier=1e-9, max_grad_norm=100.0, poisson_sampling=False,
    )  # fmt: skip
    private.train()
    ((images,),) = loader
    private(images).square().sum(1).mean().backward()
    optimizer.step()
    for parameter, wanted in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, wanted.grad)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scale_of_convnext_blocks(reduction):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), CNBlock(4, 0.3, 0.0))
    watch_statistics(net, reduction)
    x = torch.rand(3, 3, 5, 6)
    expected = compute_microbatch_grad_sample(x, net, loss_reduction=reduction)
    found = compute_opacus_grad_sample(x, net, loss_reduction=reduction)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_scale_of_a_block_that_is_the_first_layer():
    block = CNBlock(4, 0.3, 0.0)
    hooks = GradSampleHooks(block)
    watch_statistics(block)
    with pytest.raises(RuntimeError, match="Where all layers before the block are frozen"):
        block(torch.rand(3, 4, 5, 6)).sum().backward()
    hooks.remove_hooks()


def both(net, x, ghost):
    """Compare Opacus with these rules to micro-batches with the same masks."""
    register_opacus_rules()  # the hooks come before the statistics are watched
    loss, masks = loss_with(torch.rand(len(x), dtype=x.dtype) + 0.5), Masks()
    hooks = (GradSampleHooksFastGradientClipping if ghost else GradSampleHooks)(net, loss_reduction="sum")
    handles = watch_statistics(net, "sum")
    with masks.drawing():
        loss(net(x), slice(None)).backward()
    names = dict(net.named_parameters())
    samples = {name: getattr(p, "_norm_sample" if ghost else "grad_sample") for name, p in names.items()}
    for handle in handles:
        handle.remove()
    hooks.remove_hooks()
    expected = micro_batches(net, x, loss, masks)
    for name, sample in samples.items():
        wanted = norms_of({name: expected[name]}) if ghost else expected[name]
        torch.testing.assert_close(sample, wanted, rtol=1e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.parametrize("activation", ["relu", "mish"])
def test_masks_are_those_of_the_forward_pass(activation, batch, ghost):
    torch.manual_seed(0)
    net = models.knresnet8(num_classes=3, dropout_p=0.2, activation=activation).double()
    both(net, torch.rand(batch, 3, 17, 18, dtype=torch.float64), ghost)


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv2d(3, 4, 3, padding=1)])
def test_where_the_rules_of_opacus_are_wrong(layer, ghost):
    """Linear layers on images, of which they give the norms of another pass, and channels-last images."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    both(layer.double(), x, ghost)


def test_layers_used_twice_recall_the_last_pass_first():
    torch.manual_seed(0)
    conv = KNConv2d(3, 3, 3, padding=1, dropout_p=0.3)
    both(nn.Sequential(conv, nn.Tanh(), conv).double(), torch.randn(3, 3, 5, 6, dtype=torch.float64), False)


def test_statistics_that_were_not_noted_are_missed():
    conv = KNConv2d(3, 4, 2)
    hooks = GradSampleHooks(conv)
    with pytest.raises(RuntimeError, match=r"0 forward passes through KNConv2d.*watch_statistics"):
        conv(torch.rand(2, 3, 5, 5)).sum().backward()
    hooks.remove_hooks()
