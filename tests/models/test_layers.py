import pytest
import torch
from torch import nn

from knlightning.models.layers import Layers, Options, convolve
from knlightning.nn import KernelNorm2d, KNConv2d


def test_kernel_normalizes_in_the_convolutions_alone():
    layers = Layers(Options(norm="kernel", dropout_p=0.03, eps=0.1, eval_statistics="sampled"))
    conv = layers.conv(4, 6, 2, 1, (1, 0, 1, 0))
    assert type(conv) is KNConv2d
    assert (conv.padding, conv.dropout_p, conv.eps, conv.eval_statistics) == ((1, 0, 1, 0), 0.03, 0.1, "sampled")
    assert isinstance(layers.norm(6), nn.Identity)
    assert isinstance(layers.norm_act(6), nn.ReLU)
    norm, act = layers.head(6)
    assert isinstance(norm, KernelNorm2d)
    assert isinstance(act, nn.ReLU)
    assert (norm.dropout_p, norm.eps, norm.eval_statistics) == (pytest.approx(0.15), 0.1, "sampled")
    assert Layers(Options(dropout_p=0.2)).head_norm().dropout_p == 0.25
    assert Layers(Options(dropout_p=0.2), max_head_dropout=0.5).head_norm().dropout_p == 0.5


def test_other_norms_stand_before_the_activations():
    layers = Layers(Options(norm="layer", activation="mish", eps=0.1), bias=False)
    norm, act = layers.norm_act(6)
    assert isinstance(norm, nn.GroupNorm)
    assert norm.eps == 0.1
    assert isinstance(act, nn.Mish)
    assert str(layers.head(6)) == str(layers.norm_act(6))
    assert layers.conv(4, 6, 3).bias is None
    assert isinstance(Layers(Options(norm="none")).norm_act(6), nn.ReLU)


def test_plain_convolutions_take_uneven_padding_and_start_as_kernel_normalized_ones():
    torch.manual_seed(0)
    conv = Layers(Options(norm="batch")).conv(4, 600, 2, 1, (1, 0, 1, 0))
    assert conv(torch.rand(1, 4, 5, 6)).shape == (1, 600, 5, 6)
    assert conv[1].weight.std().item() == pytest.approx((2 / (600 * 4)) ** 0.5, rel=0.05)
    assert not conv[1].bias.any()


@pytest.mark.parametrize("act", [nn.ReLU(), nn.Mish(), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())])
@pytest.mark.parametrize("conv", [KNConv2d(4, 4, 3, padding=1, dropout_p=0.0), nn.Conv2d(4, 4, 3, padding=1)])
def test_convolve(conv, act):
    torch.manual_seed(0)
    x, residual = torch.randn(2, 2, 4, 5, 5)
    torch.testing.assert_close(convolve(conv, x), conv(x))
    torch.testing.assert_close(convolve(conv, x, before=act), conv(act(x)))
    torch.testing.assert_close(convolve(conv, x, before=act, after=act), act(conv(act(x))))
    torch.testing.assert_close(convolve(conv, x, residual=residual), residual + conv(x))
    torch.testing.assert_close(convolve(conv, x, before=act, residual=residual), residual + conv(act(x)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1.5}, "num_classes must be a whole number at least 1, got 1.5"),
        ({"norm": "batch", "dropout_p": float("nan")}, "dropout_p must be a number at least 0 and below 1, got nan"),
        ({"norm": "batch", "eps": float("inf")}, "eps must be a number at least 0 and at most 1, got inf"),
        ({"norm": "layers"}, "norm must be one of batch, .*, got 'layers'"),
    ],
)
def test_wrong_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        Options(**arguments)
