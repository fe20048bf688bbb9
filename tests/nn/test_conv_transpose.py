import itertools

import pytest
import torch
import torch.nn.functional as F
from nn import naive
from torch import nn

from knlightning.checks import ArgumentError
from knlightning.nn import KNConvTranspose1d, KNConvTranspose2d, KNConvTranspose3d, kn_conv, kn_conv_transpose

# kernel, stride, padding, output_padding, dilation, groups
GEOMETRIES = [
    ((3, 3), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    ((4, 4), (2, 2), (1, 1), (0, 0), (1, 1), 1),
    ((2, 2), (2, 2), (0, 0), (0, 0), (1, 1), 2),
    ((3, 5), (2, 3), (1, 2), (1, 2), (1, 1), 1),
    ((3, 2), (2, 4), (4, 0), (1, 3), (3, 2), 2),
    ((1, 3), (3, 2), (0, 0), (2, 0), (1, 2), 1),
    ((3,), (2,), (1,), (1,), (1,), 1),
    ((2, 1, 2), (2, 1, 1), (0, 0, 1), (0, 0, 0), (1, 1, 1), 1),
]


def layer_of(geometry, **settings):
    kernel, stride, padding, output_padding, dilation, groups = geometry
    kind = (KNConvTranspose1d, KNConvTranspose2d, KNConvTranspose3d)[len(kernel) - 1]
    layer = kind(4, 6, kernel, stride, padding, output_padding, groups, dilation=dilation, **settings).double()
    layer.bias.data.normal_()
    return layer


def images_of(geometry):
    return torch.randn(2, 4, *(5, 4, 3)[: len(geometry[0])], dtype=torch.float64)


def by_definition(x, layer, mask=None, p=0.0):
    """Compute one element of the output after the other from the elements of the input that reach it."""
    plain = F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d
    geometry = layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
    output = torch.zeros_like(plain[layer.spatial - 1](x, layer.weight, layer.bias, *geometry))
    dropped = x if mask is None else x * mask / (1 - p)
    depth, width = x.shape[1] // layer.groups, layer.out_channels // layer.groups
    for place in itertools.product(*map(range, output.shape[2:])):
        window = []
        for taps in itertools.product(*map(range, layer.kernel_size)):
            each = zip(place, layer.padding, taps, layer.dilation, layer.stride, strict=True)
            at = [divmod(o + pad - k * d, s) for o, pad, k, d, s in each]
            if any(remainder for _, remainder in at):
                continue
            source = tuple(i for i, _ in at)
            inside = all(0 <= i < n for i, n in zip(source, x.shape[2:], strict=True))
            zeros = torch.zeros_like(x[:, :, *(0,) * layer.spatial])
            pair = (x[:, :, *source], dropped[:, :, *source]) if inside else (zeros, zeros)
            window.append((taps, *pair))
        if window:
            unit = torch.stack([u for _, u, _ in window], 2)
            unit = naive.normalize(unit, torch.stack([d for _, _, d in window], 2), layer.eps)
            for o in range(layer.out_channels):
                channels = slice(o // width * depth, (o // width + 1) * depth)
                filters = torch.stack([layer.weight[channels, o % width, *taps] for taps, _, _ in window], 1)
                output[:, o, *place] = (unit[:, channels] * filters).sum((1, 2))
    return output + layer.bias.view(-1, *(1,) * layer.spatial)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_each_element_is_normalized_by_what_it_is_computed_from(geometry):
    layer, x = layer_of(geometry, eval_statistics="clean").eval(), images_of(geometry)
    torch.testing.assert_close(layer(x), by_definition(x, layer))
    mask = torch.rand(x.shape) < 0.7
    arguments = layer.stride, layer.padding, layer.output_padding, layer.groups, 0.3
    output = kn_conv_transpose(x, layer.weight, layer.bias, *arguments, mask=mask, dilation=layer.dilation)
    torch.testing.assert_close(output, by_definition(x, layer, mask, 0.3))


def test_with_stride_1_it_is_the_convolution_with_the_flipped_filter():
    layer, x = layer_of(GEOMETRIES[0], dropout_p=0.2), images_of(GEOMETRIES[0])
    filters = layer.weight.transpose(0, 1).flip(2, 3)
    torch.manual_seed(0)
    transposed = layer(x)
    torch.manual_seed(0)
    mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(0.8)
    torch.testing.assert_close(transposed, kn_conv(x, filters, layer.bias, padding=1, dropout_p=0.2, mask=mask))
    layer.eval().eval_statistics = "expected"
    expected = kn_conv(x, filters, layer.bias, 1, 1, 1, 0.2, False, "expected")
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("geometry", [GEOMETRIES[1], GEOMETRIES[4]])
def test_gradients(geometry):
    layer, x = layer_of(geometry), images_of(geometry)[:1, :, :2, :2].requires_grad_()
    arguments = layer.stride, layer.padding, layer.output_padding, layer.groups, 0.0

    def call(*tensors):
        return kn_conv_transpose(*tensors, *arguments, dilation=layer.dilation)

    assert torch.autograd.gradcheck(call, (x, layer.weight, layer.bias), fast_mode=True)


def test_state_dict_and_shapes_are_those_of_torch():
    layer = KNConvTranspose2d(4, 6, 3, 2, 1, 1, bias=False)
    plain = nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, bias=False)
    layer.load_state_dict(plain.state_dict())
    assert layer(torch.randn(2, 4, 5, 7)).shape == plain(torch.randn(2, 4, 5, 7)).shape
    assert "kernel_size=(3, 3)" in str(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert KNConvTranspose2d(4, 6, 1, 2)(torch.randn(2, 4, 5, 7)).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused():
    with pytest.raises(ArgumentError, match=r"weight's shape must be \[C, O / groups, \*kernel\] with C = 3"):
        kn_conv_transpose(torch.rand(1, 3, 4, 4), torch.rand(4, 2, 3, 3))
    with pytest.raises(ArgumentError, match=r"padding must be so small that something is left of the output"):
        kn_conv_transpose(torch.rand(1, 4, 1, 1), torch.rand(4, 2, 3, 3), padding=2)
    with pytest.raises(ArgumentError, match="groups must be a divisor of out_channels=3"):
        KNConvTranspose2d(4, 3, 3, groups=2)
    with pytest.raises(ArgumentError, match="padding must be a whole number at least 0, or 2 of them"):
        KNConvTranspose2d(4, 3, 3, padding="same")
