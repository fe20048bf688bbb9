import pytest
import torch
from torch.nn import functional as F

from knlightning.nn import KNConv2d, make_activation
from knlightning.nn.activations import OtherReLU


@pytest.mark.parametrize(("name", "function"), [("relu", F.relu), ("mish", F.mish), ("gelu", F.gelu), ("silu", F.silu)])
def test_names(name, function):
    x = torch.linspace(-4, 4, 33)
    before = x.clone()
    assert torch.equal(make_activation(name)(x), function(x))
    assert torch.equal(x, before)


def test_unknown_name():
    with pytest.raises(ValueError, match="activation must be one of relu, mish, gelu, silu, got 'ReLU'"):
        make_activation("ReLU")


def test_a_shared_relu_leaves_alone_what_a_layer_has_rectified():
    x, relu = torch.randn(1, 2, 4, 4, requires_grad=True), OtherReLU(inplace=True)
    rectified = KNConv2d(2, 3, 3, relu_output=True)(x)
    assert relu(rectified) is rectified
    for other in (KNConv2d(2, 3, 3)(x), rectified - 0.1):
        before = other.detach().clone()
        assert torch.equal(relu(other), before.relu())
        assert torch.equal(other, before)  # hooks may have made a view of it
    with torch.no_grad():
        assert relu(other) is other
    assert not (other < 0).any()
