import pytest
import torch
from torch.nn import functional as F

from knlightning.nn import make_activation


@pytest.mark.parametrize(("name", "function"), [("relu", F.relu), ("mish", F.mish), ("gelu", F.gelu), ("silu", F.silu)])
def test_names(name, function):
    x = torch.linspace(-4, 4, 33)
    before = x.clone()
    assert torch.equal(make_activation(name)(x), function(x))
    assert torch.equal(x, before)


def test_unknown_name():
    with pytest.raises(ValueError, match="activation must be one of relu, mish, gelu, silu, got 'ReLU'"):
        make_activation("ReLU")
