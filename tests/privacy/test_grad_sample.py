from typing import Any

import pytest
import torch
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from opacus.utils.per_sample_gradients_utils import (
    check_per_sample_gradients_are_correct,
    compute_microbatch_grad_sample,
    compute_opacus_grad_sample,
)
from privacy.micro_batches import Masks, loss_with, micro_batches, norms_of
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock, LayerNorm2d

from knlightning import models
from knlightning.models.knresnet import BasicBlock, Layers
from knlightning.nn import KNConv1d, KNConv2d, KNConv3d, LocalContextNorm2d, PositionalNorm2d
from knlightning.privacy import check_rules, watch_statistics

# torch tells so of the first layer, whose images need no gradient
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")

LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (KNConv1d(4, 6, 3, 2, 1, groups=2, dropout_p=0.0), (4, 7)),
    (KNConv2d(3, 4, 2, padding=(1, 0, 2, 0), dropout_p=0.0), (3, 5, 6)),
    (KNConv2d(3, 4, 3, padding="same", dropout_p=0.0, dilation=2, padding_mode="reflect"), (3, 5, 6)),
    (nn.Conv2d(3, 4, 3, padding=2, padding_mode="circular"), (3, 5, 6)),
    (KNConv2d(4, 4, (2, 3), (2, 1), groups=2, bias=False, dropout_p=0.0), (4, 5, 6)),
    (KNConv3d(2, 3, 2, dropout_p=0.0), (2, 3, 4, 5)),
    (nn.Conv1d(4, 6, 3, 2, 1, groups=2), (4, 7)),
    (nn.Conv2d(4, 6, 3, dilation=2, padding=2, groups=2), (4, 5, 6)),
    (nn.Conv2d(3, 4, 4, padding="same", bias=False), (3, 5, 6)),
    (nn.Conv3d(2, 3, 2), (2, 3, 4, 5)),
    (nn.Linear(5, 3), (5,)),
    (nn.Linear(5, 3), (2, 5)),
    (nn.Linear(5, 3), (2, 3, 5)),
    (nn.GroupNorm(2, 4), (4, 5, 6)),
    (nn.LayerNorm(6), (4, 5, 6)),
    (nn.InstanceNorm2d(4, affine=True), (4, 5, 6)),
    (LocalContextNorm2d(4, window=3), (4, 5, 6)),
    (PositionalNorm2d(4), (4, 5, 6)),
    (LayerNorm2d(4), (4, 5, 6)),
    (BasicBlock(4, 6, Layers(dropout_p=0.0)), (4, 5, 6)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: str(v) if isinstance(v, tuple) else type(v).__name__)
def test_opacus_own_check_of_layers(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, *shape)
    handles = watch_statistics(layer)
    assert check_per_sample_gradients_are_correct(x, layer, atol=1e-5)
    if not isinstance(layer, nn.InstanceNorm2d):  # for which torch takes no empty batches
        for name, samples in compute_opacus_grad_sample(x[:0], layer).items():
            assert samples.shape == (0, *layer.get_parameter(name).shape)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("norm", ["kernel", "group", "layer", "local_context", "positional", "none"])
def test_opacus_own_check_of_a_network(norm: Any) -> None:
    torch.manual_seed(0)
    net = models.resnet8(3, norm=norm, dropout_p=0.0).double()
    watch_statistics(net)
    assert check_per_sample_gradients_are_correct(torch.rand(2, 3, 16, 17, dtype=torch.float64), net)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scale_of_convnext_blocks(reduction: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), CNBlock(4, 0.3, 0.0))
    watch_statistics(net, reduction)
    x = torch.rand(3, 3, 5, 6)
    expected = compute_microbatch_grad_sample(x, net, loss_reduction=reduction)
    found = compute_opacus_grad_sample(x, net, loss_reduction=reduction)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_scale_of_a_block_that_is_the_first_layer() -> None:
    block = CNBlock(4, 0.3, 0.0)
    hooks = GradSampleHooks(block)
    watch_statistics(block)
    with pytest.raises(RuntimeError, match="where all layers before the block are frozen"):
        block(torch.rand(3, 4, 5, 6)).sum().backward()
    hooks.remove_hooks()


def both(net: nn.Module, x: Tensor, ghost: bool) -> None:
    """Compare Opacus with these rules to micro-batches with the same masks."""
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
def test_masks_are_those_of_the_forward_pass(activation: Any, batch: int, ghost: bool) -> None:
    torch.manual_seed(0)
    net = models.knresnet8(3, dropout_p=0.2, activation=activation).double()
    both(net, torch.rand(batch, 3, 17, 18, dtype=torch.float64), ghost)


@pytest.mark.parametrize("ghost", [False, True])
def test_linear_layers_on_images(ghost: bool) -> None:
    """Of which Opacus' own rule gives the norms of another pass."""
    torch.manual_seed(0)
    both(nn.Linear(4, 3).double(), torch.randn(2, 3, 5, 4, dtype=torch.float64), ghost)


@pytest.mark.parametrize("ghost", [False, True])
def test_channels_last_images(ghost: bool) -> None:
    """Of which Opacus' own rule gives wrong gradients."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    both(nn.Conv2d(3, 4, 3, padding=1).double(), x, ghost)


def test_layers_used_twice_recall_the_last_pass_first() -> None:
    torch.manual_seed(0)
    conv = KNConv2d(3, 3, 3, padding=1, dropout_p=0.3)
    both(nn.Sequential(conv, nn.Tanh(), conv).double(), torch.randn(3, 3, 5, 6, dtype=torch.float64), False)


def test_statistics_that_were_not_noted_are_missed() -> None:
    conv = KNConv2d(3, 4, 2)
    hooks = GradSampleHooks(conv)
    with pytest.raises(RuntimeError, match=r"0 forward passes through KNConv2d.*watch_statistics"):
        conv(torch.rand(2, 3, 5, 5)).sum().backward()
    hooks.remove_hooks()


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
        (nn.InstanceNorm2d(3, affine=True, track_running_stats=True), r"0 \(InstanceNorm2d\): running statistics mix"),
    ],
)
def test_layers_without_a_rule(layer: nn.Module, problem: str) -> None:
    (found,) = check_rules(nn.Sequential(layer))
    with pytest.raises(ValueError, match=problem):
        raise ValueError(found)
    assert check_rules(nn.Sequential(layer.requires_grad_(False))) == []


@pytest.mark.parametrize("name", [name for name in models.__all__ if "resne" in name.lower() and name != "KNResNet"])
def test_backbones_have_rules(name: str) -> None:
    for norm in ("kernel", "layer", "instance", "positional", "none"):
        assert check_rules(getattr(models, name)(3, norm=norm)) == []


@pytest.mark.parametrize("name", ["convnext_tiny", "knconvnext_tiny"])
def test_convnexts_have_rules(name: str) -> None:
    assert check_rules(getattr(models, name)(3)) == []
