import pytest
import torch
from torch import nn

from knlightning.models import convnext_tiny, knconvnext_tiny
from knlightning.nn import KNConv2d


def test_the_three_downsampling_layers_are_kernel_normalized_and_nothing_else():
    plain, ours = convnext_tiny(num_classes=7), knconvnext_tiny(num_classes=7, dropout_p=0.3)
    changed = ["features.2", "features.4", "features.6"]
    for name in changed:
        relu, conv = ours.get_submodule(name).children()
        was = plain.get_submodule(name)[1]
        assert isinstance(relu, nn.ReLU)
        assert isinstance(conv, KNConv2d)
        assert (conv.in_channels, conv.out_channels) == (was.in_channels, was.out_channels)
        assert (conv.kernel_size, conv.stride, conv.dropout_p) == ((2, 2), (2, 2), 0.3)
    rest = [
        {n: type(m) for n, m in model.named_modules() if not n.startswith(tuple(changed))} for model in (plain, ours)
    ]
    assert rest[0] == rest[1]
    assert {m.dropout_p for m in knconvnext_tiny().modules() if isinstance(m, KNConv2d)} == {0.1}


def test_weights_are_drawn_as_those_of_convnext():
    torch.manual_seed(0)
    conv = knconvnext_tiny(num_classes=2).get_submodule("features.4.1")
    assert conv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not conv.bias.any()


def test_downsampling_is_relu_and_normalized_convolution():
    layer = knconvnext_tiny(num_classes=2, dropout_p=0.0).double().eval().get_submodule("features.2")
    x = torch.randn(2, 96, 4, 4, dtype=torch.float64)
    windows = nn.functional.unfold(x.relu(), 2, stride=2).transpose(1, 2)  # [N, positions, C * 2 * 2]
    normalized = nn.functional.layer_norm(windows, windows.shape[2:], eps=1e-5)
    conv = layer[1]
    expected = (normalized @ conv.weight.flatten(1).T + conv.bias).transpose(1, 2).unflatten(2, (2, 2))
    torch.testing.assert_close(layer(x), expected)
