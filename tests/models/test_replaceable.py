import copy

import pytest
import timm
import torch
from torch import nn

from knlightning.models.replaceable import PixelNorm, conv_obstacle, knconv_of, norm_obstacle, without_batch
from knlightning.nn import (
    KernelNorm2d,
    KernelNorm3d,
    KNConv1d,
    KNConv2d,
    KNConv3d,
    KNConvTranspose2d,
    StandardizedKNConv2d,
    kn_conv,
)


class OtherConv(nn.Conv2d):
    def forward(self, input):
        return super().forward(input * 2)


class ConditionalNorm(nn.BatchNorm2d):
    def forward(self, input, scale=2.0):
        return super().forward(input) * scale


class GatedNorm(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.gate = nn.Linear(1, 1)


def hooked(layer):
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    ("conv", "kind"),
    [
        (nn.Conv1d(4, 6, 3, 2, 1), KNConv1d),
        (nn.Conv2d(4, 6, 3, groups=2), KNConv2d),
        (nn.Conv3d(4, 6, 1), KNConv3d),
        (timm.layers.StdConv2d(4, 6, 3, bias=True), StandardizedKNConv2d),
        (nn.ConvTranspose2d(4, 6, 4, 2, 1, 1, 2), KNConvTranspose2d),
    ],
)
def test_the_layer_has_the_shape_and_the_parameters_of_the_convolution(conv, kind):
    layer = knconv_of(conv.eval(), dropout_p=0.2, eps=0.1, eval_statistics="expected")
    assert type(layer) is kind
    assert (layer.weight is conv.weight, layer.bias is conv.bias) == (True, True)
    assert (layer.kernel_size, layer.stride, layer.groups) == (conv.kernel_size, conv.stride, conv.groups)
    assert (layer.padding, layer.training) == (conv.padding, False)
    assert (layer.dropout_p, layer.eps, layer.eval_statistics) == (0.2, 0.1, "expected")


@pytest.mark.parametrize("padding", ["same", "valid", 2])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
def test_every_padding_and_dilation_is_kept(padding, padding_mode):
    """The windows are those of the convolution: without their normalization, its result is the convolution's."""
    conv = nn.Conv2d(4, 6, (3, 3), padding=padding, padding_mode=padding_mode, dilation=(1, 2)).double()
    layer = knconv_of(conv, dropout_p=0.0, eps=1e8)  # so large that nothing is divided by the spread of a window
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    centred = conv(x) - conv.bias.view(-1, 1, 1)
    mean = nn.functional.conv2d(*padded(conv, x), dilation=conv.dilation)
    expected = (centred - mean * conv.weight.sum((1, 2, 3)).view(-1, 1, 1)) / 1e4
    torch.testing.assert_close(layer(x) - layer.bias.view(-1, 1, 1), expected, rtol=1e-6, atol=1e-9)


def padded(conv, x):
    """The padded input, and filters that take the mean of its windows."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    amount = {"same": (2, 2, 1, 1), "valid": (0, 0, 0, 0)}.get(conv.padding, (2, 2, 2, 2))
    return nn.functional.pad(x, amount, mode), torch.full((1, 4, 3, 3), 1 / 36, dtype=torch.float64)


def test_a_bias_of_zeros_where_there_was_none():
    conv = nn.Conv2d(4, 6, 3, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    bias = knconv_of(conv, dropout_p=0.0).bias
    assert (bias.shape, bias.dtype, bias.requires_grad, bias.any()) == ((6,), torch.bfloat16, False, False)


@pytest.mark.parametrize(
    ("conv", "why"),
    [
        (OtherConv(4, 4, 3), "OtherConv computes something else than Conv2d"),
        (timm.layers.StdConv2d(4, 4, 3, groups=2), "StdConv2d computes something else than Conv2d"),
        (hooked(nn.Conv2d(4, 4, 3)), "it has hooks or parametrizations, which would be lost"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), "it has hooks or parametrizations"),
    ],
)
def test_convolutions_that_cannot_be_replaced(conv, why):
    with pytest.raises(ValueError, match=f"cannot be kernel normalized: {why}"):
        knconv_of(conv, dropout_p=0.0)


def test_other_layers_are_no_obstacle():
    assert conv_obstacle(nn.BatchNorm2d(4)) is None


@pytest.mark.parametrize(
    ("norm", "why"),
    [
        (nn.BatchNorm2d(4), None),
        (GatedNorm(4), "GatedNorm has layers of its own: gate"),
        (ConditionalNorm(4), "ConditionalNorm takes more than one input"),
        (hooked(nn.BatchNorm2d(4)), "it has hooks or parametrizations, which would be lost"),
    ],
)
def test_normalizations_that_cannot_be_removed(norm, why):
    assert norm_obstacle(norm) == why


SETTINGS = {"dropout_p": 0.02, "eps": 0.1, "eval_statistics": "expected"}


@pytest.mark.parametrize(
    ("norm", "shape", "kind"),
    [
        (nn.BatchNorm2d(4), (2, 4, 3, 2), KernelNorm2d),
        (nn.BatchNorm3d(4), (2, 4, 3, 2, 1), KernelNorm3d),
        (nn.BatchNorm1d(4), (2, 4, 3), PixelNorm),
        (nn.BatchNorm1d(4), (2, 4), PixelNorm),
        (nn.SyncBatchNorm(4), (2, 4, 3, 2), PixelNorm),
        (nn.InstanceNorm1d(4, track_running_stats=True), (2, 4, 3), PixelNorm),
    ],
)
def test_batch_normalization_becomes_kernel_norm_of_each_pixel(norm, shape, kind):
    new, name = without_batch(norm.eval(), "kernel", **SETTINGS)
    assert type(new) is kind
    assert name.startswith(f"{kind.__name__}(kernel_size=(1,")
    assert (new.dropout_p, new.eps, new.eval_statistics, new.training) == (0.1, 0.1, "expected", False)
    new.eval_statistics = "clean"
    x = torch.randn(shape)
    centred = x - x.mean(1, keepdim=True)
    torch.testing.assert_close(new(x), centred / (centred.square().mean(1, keepdim=True) + 0.1).sqrt())
    with pytest.raises(AttributeError):  # as in the paper's networks it neither scales nor shifts
        new.get_parameter("weight")


@pytest.mark.parametrize(("rest", "channels", "groups"), [("group", 24, 12), ("group", 96, 32), ("layer", 24, 1)])
def test_batch_normalization_becomes_group_normalization(rest, channels, groups):
    norm = nn.BatchNorm2d(channels)
    new, _ = without_batch(norm, rest, **SETTINGS)
    assert (type(new), new.num_groups, new.eps) == (nn.GroupNorm, groups, 0.1)
    assert (new.weight is norm.weight, new.bias is norm.bias) == (True, True)
    assert not without_batch(nn.BatchNorm2d(channels, affine=False), rest, **SETTINGS)[0].affine


def test_a_single_channel_is_normalized_over_all_its_pixels():
    assert without_batch(nn.BatchNorm2d(1), "kernel", **SETTINGS)[1].startswith("GroupNorm(1, 1")


def test_what_is_no_batch_normalization_or_has_obstacles_is_not_replaced():
    for layer in (nn.GroupNorm(1, 4), hooked(nn.BatchNorm2d(4)), GatedNorm(4)):
        assert without_batch(layer, "kernel", **SETTINGS) is None


@pytest.mark.parametrize(("size", "stride", "kernel"), [((9, 8), (2, 3), (3, 4)), ((4, 5), (2, 1), (1, 5))])
def test_padding_that_follows_from_the_size_of_the_input(size, stride, kernel):
    """As timm pads for networks of TensorFlow."""
    conv = timm.layers.Conv2dSame(4, 6, kernel, stride, groups=2, dilation=2).double().eval()
    layer = knconv_of(conv, dropout_p=0.0)
    assert type(layer) is KNConv2d
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    padded = timm.layers.pad_same(x, kernel, stride, (2, 2))
    expected = kn_conv(padded, conv.weight, conv.bias, stride, 0, 2, 0.0, dilation=2)
    assert torch.equal(layer(x), expected)
    assert layer(x).shape == conv(x).shape
    assert torch.equal(copy.deepcopy(layer)(x), expected)
