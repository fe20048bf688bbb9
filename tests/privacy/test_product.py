"""Gradients in factors; all ways to norms and sums are held against single samples in test_per_sample.py."""

import pytest
import torch
from torch import nn

from knlightning.nn.windows import Window
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
    product = Product(weight, x, grad, Window.of(2, 1), 1, views=views)
    truth = torch.einsum("nohl,nchl->noc", grad.double(), x.double()).unflatten(0, (-1, views)).sum(1)
    truth = truth.flatten(1).norm(dim=1)
    assert product._ghost()
    norms = product.squared_norms().double().sqrt()
    largest = (grad.norm(dim=1) * x.norm(dim=1)).double().flatten(1).sum(1).unflatten(0, (-1, views)).sum(1)
    assert bool((norms >= truth * (1 - 1e-6)).all()), (norms / truth).min()
    assert bool((norms <= truth + 5e-3 * largest).all())  # and not much too large either, beside what cancelled
    assert bool((truth < 1e-4 * largest).all())  # that is what this is about


def test_temporaries_have_a_size_on_every_device():
    assert temporary_bytes(torch.device("cpu")) == TEMPORARY_BYTES["cpu"]
    assert temporary_bytes(torch.device("cuda", 1)) == TEMPORARY_BYTES_ELSEWHERE


def test_a_selection_of_samples():
    torch.manual_seed(0)
    weight, kept = nn.Parameter(torch.zeros(4, 3, 2, 2)), torch.tensor([True, False, True])
    whole = Product(weight, torch.rand(3, 3, 4, 4), torch.rand(3, 4, 3, 3), Window.of(2, 2), 1)
    assert torch.equal(whole.select(kept).samples(), whole.samples()[kept])
