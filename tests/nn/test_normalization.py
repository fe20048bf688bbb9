from typing import get_args

import pytest
import torch
from nn import naive
from torch import Tensor, nn

from knlightning.nn import KernelNorm2d, Norm, make_norm


def over(*dims: int):
    def normalize(x: Tensor) -> Tensor:
        mean = x.mean(dims, keepdim=True)
        return (x - mean) / torch.sqrt((x - mean).square().mean(dims, keepdim=True) + 1e-5)

    return normalize


def in_groups(groups: int):
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
def test_names_mean_what_they_say(norm: Norm) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 64, 3, 5, dtype=torch.float64) * torch.rand(2, 64, 1, 1, dtype=torch.float64) + 2
    layer = make_norm(norm, 64).double()
    torch.testing.assert_close(layer(x), EXPECTED[norm](x))
    assert sum(p.numel() for p in layer.parameters()) == (0 if norm == "none" else 128)


def test_kernel() -> None:
    layer = make_norm("kernel", 6).double().eval()
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), naive.positional_norm(x))
    assert isinstance(layer, KernelNorm2d)
    assert layer.dropout_p == 0.25


def test_every_name_is_tested() -> None:
    assert {*EXPECTED, "kernel"} == set(get_args(Norm))


def test_channels_that_the_groups_do_not_divide() -> None:
    with pytest.raises(ValueError, match="multiple of 32 channels, got 48 channels"):
        make_norm("group", 48)
    with pytest.raises(ValueError, match="groups must be a divisor of the number of channels, 5, got 2"):
        make_norm("local_context", 5)


def test_unknown_name() -> None:
    known = "batch, sync_batch, layer, group, instance, positional, local_context, kernel, none"
    with pytest.raises(ValueError, match=f"norm must be one of {known}, got 'layers'"):
        make_norm("layers", 8)
    assert isinstance(make_norm("none", 8), nn.Identity)
