import pytest
import torch
from nn import naive

from knlightning.checks import ArgumentError
from knlightning.nn import GroupKNConv1d, GroupKNConv2d, GroupKNConv3d, KNConv2d, kn_conv_by_group
from knlightning.nn.statistics import expected_inflation


@pytest.mark.parametrize(
    ("layer", "pads"),
    [
        (GroupKNConv1d(6, 4, 3, 2, 1, groups=2), (1, 1)),
        (GroupKNConv2d(6, 6, (3, 2), (1, 2), (1, 0), groups=6), (0, 0, 1, 1)),
        (GroupKNConv2d(6, 6, 3, padding=1, groups=3, padding_mode="circular", dilation=2, bias=False), (1, 1, 1, 1)),
        (GroupKNConv3d(6, 4, 2, groups=2), (0,) * 6),
    ],
)
def test_each_group_is_a_kernel_normalized_convolution(layer, pads):
    layer = layer.double().eval()
    layer.eval_statistics = "clean"
    x = torch.randn(2, 6, *(6, 5, 4)[: layer.spatial], dtype=torch.float64, requires_grad=True)
    depth, width = 6 // layer.groups, layer.out_channels // layer.groups

    def part(g):
        bias = None if layer.bias is None else layer.bias[g * width : (g + 1) * width]
        geometry = {"dilation": layer.dilation, "padding_mode": layer.padding_mode}
        weight = layer.weight[g * width : (g + 1) * width]
        return naive.kn_conv(x[:, g * depth : (g + 1) * depth], weight, bias, layer.stride, pads, **geometry)

    expected = torch.cat([part(g) for g in range(layer.groups)], 1)
    torch.testing.assert_close(layer(x), expected)
    wanted = [x, layer.weight]
    gradients = (torch.autograd.grad(output.sin().sum(), wanted) for output in (layer(x), expected))
    torch.testing.assert_close(*gradients)


def test_dropout_is_of_the_elements_of_a_group():
    """Without a spread the mean square of what is dropped out shows in the variance: with p = 0.5 all is seen."""
    weight, x = torch.zeros(2, 1, 2, 2, dtype=torch.float64), torch.ones(1, 2, 2, 2, dtype=torch.float64)
    weight[:, 0, 0, 0] = 1
    expected = kn_conv_by_group(x * 3, weight, None, 1, 0, 2, 0.5, False, "expected", 0.0)
    torch.testing.assert_close(expected, torch.zeros_like(expected))  # the window is its own mean
    x[0, 0, 0, 0] = 2.0
    mean, square = 5 / 4, 7 / 4
    inflation = expected_inflation(4, 0.5)
    value = (2 - mean) / (inflation * square - mean**2) ** 0.5
    output = kn_conv_by_group(x, weight, None, 1, 0, 2, 0.5, False, "expected", 0.0)
    torch.testing.assert_close(output[0, 0, 0, 0].item(), value)
    drawn = {kn_conv_by_group(x, weight, None, 1, 0, 2, 0.5, eps=1.0)[0, 0, 0, 0].item() for _ in range(50)}
    assert len(drawn) > 3


def test_activations_and_sums_around_it_are_those_of_the_other_layers():
    layer = GroupKNConv2d(4, 4, 3, padding=1, groups=2, dropout_p=0.0)
    x, residual = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(layer(x, relu_input=True, relu_output=True), layer(x.relu()).relu())
    torch.testing.assert_close(layer(x, residual=residual, keep_output=True), layer(x) + residual)
    assert layer(x[:0]).shape == (0, 4, 5, 5)
    layer.load_state_dict(KNConv2d(4, 4, 3, groups=2).state_dict())


def test_a_window_of_one_element_is_refused():
    with pytest.raises(ArgumentError, match="weight's shape must be filters of more than one element of a group"):
        GroupKNConv2d(4, 4, 1, groups=4)(torch.rand(1, 4, 2, 2))
