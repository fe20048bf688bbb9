import math

import pytest
import torch

from knlightning.nn import fused_passes
from knlightning.nn.dropout import draw_dropped, draw_mask, in_memory_order, mask_of, pixels_of
from knlightning.nn.fused import draw_seed
from knlightning.nn.fused_passes import mask_of_seed

DRAWS = {
    "by gaps": lambda like, p: mask_of(draw_dropped(like.numel(), p), like),
    "by torch": draw_mask,
    "from a seed": lambda like, p: mask_of_seed(draw_seed(like.device), like, p),
}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("p", [0.05, 0.25, 0.9])
def test_drawn_masks_are_independent_bernoulli(draw, p, monkeypatch):
    """Counts, and pairs of neighbours in every direction, against their binomial distributions at 5 sigma."""
    for name, value in {"_TILE": 2**16, "_PROGRAMS": 1}.items():  # large blocks, for Triton's interpreter
        monkeypatch.setattr(fused_passes, name, value)
    shape = (20, 30, 40, 41)
    torch.manual_seed(3)
    like = torch.empty(shape)
    n = like.numel()
    dropped = ~DRAWS[draw](like, p)
    assert abs(dropped.sum().item() - n * p) < 5 * math.sqrt(n * p * (1 - p))
    for dim in range(4):
        size = shape[dim]
        pairs = dropped.narrow(dim, 1, size - 1) & dropped.narrow(dim, 0, size - 1)
        # overlapping pairs are correlated: var = n p^2 (1 - p^2) + 2 n p^3 (1 - p)
        deviation = math.sqrt(pairs.numel() * p * p * (1 - p * p + 2 * p * (1 - p)))
        assert abs(pairs.sum().item() - pairs.numel() * p * p) < 5 * deviation
    each = dropped.flatten(1).sum(1).double()  # by image
    spread = n / 20 * p * (1 - p)
    assert ((each - n / 20 * p).square() / spread).sum() < 20 + 5 * math.sqrt(2 * 20)


def test_first_and_last_element_are_dropped_as_often_as_any():
    torch.manual_seed(0)
    draws = torch.stack([mask_of(draw_dropped(5, 0.3), torch.empty(5)) for _ in range(4000)])
    assert ((draws.double().mean(0) - 0.7).abs() < 5 * math.sqrt(0.21 / 4000)).all()


@pytest.mark.parametrize("count", [0, 1, 7, 10_000])
def test_dropped_positions_ascend_within_the_tensor(count):
    for p in (1e-9, 0.05, 0.999):
        dropped = draw_dropped(count, p)
        assert (dropped.diff() > 0).all()
        assert ((dropped >= 0) & (dropped < count)).all()


def test_more_gaps_are_drawn_when_the_first_do_not_reach_the_end(monkeypatch):
    monkeypatch.setattr(math, "sqrt", lambda _: -20.0)  # so that too few are drawn at first
    torch.manual_seed(0)
    dropped = draw_dropped(100_000, 0.05)
    monkeypatch.undo()
    assert abs(len(dropped) - 5000) < 5 * math.sqrt(5000)
    assert dropped[-1] > 99_000


@pytest.mark.parametrize("channels_last", [True, False])
def test_pixels_of_positions(channels_last):
    x = torch.zeros(2, 3, 4, 5)
    pixels = torch.arange(2 * 4 * 5).reshape(2, 1, 4, 5).expand_as(x)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    ordered = in_memory_order(torch.empty_like(x, dtype=torch.int64).copy_(pixels))
    assert torch.equal(pixels_of(torch.arange(x.numel()), x), ordered)
