"""Gradients in factors; all ways to norms and sums are held against single samples in test_per_sample.py."""

from itertools import product

import pytest
import torch
from torch import nn

from knlightning.nn import KNConv2d
from knlightning.nn.functional import normalization_of
from knlightning.nn.windows import Window
from knlightning.privacy.clipping import MARGIN
from knlightning.privacy.product import TEMPORARY_BYTES, TEMPORARY_BYTES_ELSEWHERE, Product, temporary_bytes


@pytest.mark.parametrize("views", [1, 2])
def test_norms_of_gradients_that_cancel_are_not_too_small(views):
    """Where positions of one sample contradict each other, rounding is most of what a sum of products shows."""
    torch.manual_seed(0)
    samples, positions = 200, 16
    grad = torch.randn(samples, 64, 1, positions)
    grad[..., 1::2] = -grad[..., ::2]
    x = torch.randn(samples, 128, 1, 1).expand(-1, -1, -1, positions) + 1e-5 * torch.randn(samples, 128, 1, positions)
    weight = nn.Parameter(torch.zeros(64, 128, 1, 1))
    factors = Product(weight, x, grad, Window.of(2, 1), 1, views=views)
    truth = torch.einsum("nohl,nchl->noc", grad.double(), x.double()).unflatten(0, (-1, views)).sum(1)
    truth = truth.flatten(1).norm(dim=1)
    assert factors._ghost()
    norms = factors.squared_norms().double().sqrt()
    largest = (grad.norm(dim=1) * x.norm(dim=1)).double().flatten(1).sum(1).unflatten(0, (-1, views)).sum(1)
    assert bool((norms >= truth * (1 - 1e-6)).all()), (norms / truth).min()
    assert bool((norms <= truth + 5e-3 * largest).all())  # and not much too large either, beside what cancelled
    assert bool((truth < 1e-4 * largest).all())  # that is what this is about


def offset_images(offset, spread, varying):
    """Images around a large constant, or around one that varies from top to bottom."""
    x = spread * torch.randn(3, 8, 6, 6)
    return x + offset * (torch.linspace(0, 1, 6)[:, None] if varying else 1.0)


GRADIENTS = {
    "random": lambda: torch.randn(3, 5, 6, 6),
    "one for all positions": lambda: torch.randn(3, 5, 1, 1).expand(-1, -1, 6, 6),
    "whose sum over positions is 0": lambda: (grad := torch.randn(3, 5, 6, 6)) - grad.mean((2, 3), keepdim=True),
}


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("gradients", GRADIENTS)
@pytest.mark.parametrize("kernel", [3, 1])
@pytest.mark.parametrize("normalized", [True, False])
def test_no_part_of_a_sum_is_larger_than_its_norm_said(monkeypatch, ghost, gradients, kernel, normalized):
    """The sum is computed by other formulas than the norms, and rounding may be most of either."""
    monkeypatch.setattr(Product, "_ghost", lambda self: ghost)
    for images in product((0.0, 1e3, 1e6), (1.0, 1e-3), (False, True)):
        compare_norms_and_sums(gradients, kernel, normalized, *images)


def compare_norms_and_sums(gradients, kernel, normalized, offset, spread, varying):
    torch.manual_seed(0)
    padding = kernel // 2
    x, conv = offset_images(offset, spread, varying), KNConv2d(8, 5, kernel, 1, padding, dropout_p=0.0)
    grad, weight = GRADIENTS[gradients]().contiguous(), conv.weight
    if normalized:
        found = normalization_of(conv(x))
        factors = Product(weight, x, grad, found.window, 1, mean=found.mean, rstd=found.rstd)
    else:
        factors = Product(weight, x, grad, Window.of(2, kernel, 1, padding), 1)
    norms = factors.squared_norms().sqrt()
    for sample in range(3):
        part = factors.weighted_sum(torch.eye(3)[sample] / norms[sample])
        assert part.double().norm() <= 1 + MARGIN, (offset, spread, varying)
    if offset == 0 and gradients == "random":
        exact = torch.linalg.vector_norm(factors.samples().double().flatten(1), dim=1)
        torch.testing.assert_close(norms.double(), exact, rtol=1e-3, atol=0)


def test_temporaries_have_a_size_on_every_device():
    assert temporary_bytes(torch.device("cpu")) == TEMPORARY_BYTES["cpu"]
    assert temporary_bytes(torch.device("cuda", 1)) == TEMPORARY_BYTES_ELSEWHERE


def test_a_selection_of_samples():
    torch.manual_seed(0)
    weight, kept = nn.Parameter(torch.zeros(4, 3, 2, 2)), torch.tensor([True, False, True])
    whole = Product(weight, torch.rand(3, 3, 4, 4), torch.rand(3, 4, 3, 3), Window.of(2, 2), 1)
    assert torch.equal(whole.select(kept).samples(), whole.samples()[kept])
