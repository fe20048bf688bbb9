"""Gradients of samples are computed in float32 where torch would round the factors of products."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from knlightning.nn import KNConv2d
from knlightning.privacy import PerSampleGradients
from knlightning.privacy.precision import _BACKENDS, full_float32
from knlightning.privacy.product import Product


def precisions():
    return [backend.fp32_precision for backend in _BACKENDS]


@pytest.fixture(params=["high", "medium"])
def coarse(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield precisions()
    torch.set_float32_matmul_precision(before)


class Precisions(TorchDispatchMode):
    """Note the precision that torch is set to whenever it multiplies matrices or convolves."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in ("mm", "mv", "convolution", "dot", "einsum")):
            self.seen.append((str(func), precisions()))
        return func(*args, **(kwargs or {}))


def test_the_settings_of_torch_hold_again_afterwards(coarse):
    assert "ieee" not in coarse
    with full_float32():
        assert precisions() == ["ieee"] * 4
    assert precisions() == coarse
    with pytest.raises(ZeroDivisionError), full_float32():
        raise ZeroDivisionError
    assert precisions() == coarse


@pytest.mark.parametrize("ghost", [True, False])
def test_norms_and_sums_of_a_network(coarse, ghost, monkeypatch):
    monkeypatch.setattr(Product, "_ghost", lambda self: ghost)
    monkeypatch.setattr(Product, "small", lambda self: False)
    torch.manual_seed(0)
    net = nn.Sequential(
        KNConv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.GroupNorm(1, 5), nn.Linear(5, 3),
    )  # fmt: skip
    gradients = PerSampleGradients(net)
    gradients.attach()
    loss = F.cross_entropy(net(torch.rand(4, 3, 9, 9)), torch.arange(4) % 3)
    watched = Precisions()
    squared_norms = Product.squared_norms

    def watched_norms(self):
        with watched:
            return squared_norms(self)

    monkeypatch.setattr(Product, "squared_norms", watched_norms)
    loss.backward()
    norms_seen = len(watched.seen)
    assert norms_seen >= 3  # a product for every weight, at least
    with watched:
        gradients.norms()
        gradients.accumulate(torch.ones(4))
    assert len(watched.seen) - norms_seen >= 6  # weights, and vectors of samples
    assert all(precisions == ["ieee"] * 4 for _, precisions in watched.seen), watched.seen
    assert precisions() == coarse
