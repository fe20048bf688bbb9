import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from nn import naive
from nn.cases import cases, close

from knlightning.nn import kernel_norm
from knlightning.nn.dropout import draw_dropped, mask_of
from knlightning.nn.statistics import pixel_moments, pixel_moments_by_sums, window_moments, windows_transposed
from knlightning.nn.windows import Window


@pytest.mark.parametrize("padding", [0, 1])
def test_moments_where_the_mean_is_far_above_the_spread(padding):
    """They are as exact as float32 holds the input itself."""
    torch.manual_seed(0)
    x = 1e4 + torch.randn(2, 8, 9, 9)
    mean, var = window_moments(*pixel_moments_by_sums(x, None, 0.0), Window.of(2, 3, padding=padding))
    cut = naive.windows(x.double(), (3, 3), (1, 1), (padding,) * 4, None, 0.0)
    for (i, j), (unit, _) in cut.items():
        exact = unit.flatten(1).var(1, correction=0)
        # float32 holds a pixel's mean to 1e4 * 2^-24 = 6e-4, beside a spread of 1
        torch.testing.assert_close(var[:, 0, i, j].double(), exact, rtol=1e-3, atol=0)
        torch.testing.assert_close(mean[:, 0, i, j].double(), unit.flatten(1).mean(1), rtol=2e-7, atol=0)


def test_both_halves_of_an_image_far_apart():
    """No single shift centres this image; every window has to be centred by itself."""
    x = torch.randn(1, 8, 4, 12)
    x[..., :6] += 1e4
    x[..., 6:] -= 1e4
    _, var = window_moments(*pixel_moments_by_sums(x, None, 0.0), Window.of(2, 2))
    for (i, j), (unit, _) in naive.windows(x.double(), (2, 2), (1, 1), (0,) * 4, None, 0.0).items():
        torch.testing.assert_close(var[:, 0, i, j].double(), unit.flatten(1).var(1, correction=0), rtol=1e-3, atol=0)


def test_sums_and_two_passes_agree_and_cancellation_is_mended():
    torch.manual_seed(0)
    x = torch.randn(2, 16, 5, 5)
    x[0, :, 2] += 1e4  # one row of pixels far from zero
    x[1, :, 3, 3] = 7.0  # one constant pixel
    torch.testing.assert_close(pixel_moments_by_sums(x, None, 0.0), pixel_moments(x, None, 0.0), rtol=1e-5, atol=1e-6)
    assert pixel_moments_by_sums(x, None, 0.0)[1][1, 0, 3, 3] == 0
    dropped = draw_dropped(x.numel(), 0.3)
    ours, reference = pixel_moments_by_sums(x, dropped, 0.3), pixel_moments(x, mask_of(dropped, x), 0.3)
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)


def test_expected_statistics_average_those_of_all_masks():
    p = 0.3
    x = torch.randn(1, 2, 2, 2, dtype=torch.float64)
    window = Window.of(2, 2)
    mean, second = torch.zeros(()), torch.zeros(())
    for kept in itertools.product([True, False], repeat=8):
        m, v = window_moments(*pixel_moments(x, torch.tensor(kept).reshape(x.shape), p), window)
        weight = math.prod(1 - p if k else p for k in kept)
        mean, second = mean + weight * m, second + weight * v
    expected = (x - mean) / torch.sqrt(second + 1e-5)
    torch.testing.assert_close(kernel_norm(x, 2, dropout_p=p, training=False, eval_statistics="expected"), expected)


@settings(max_examples=30, deadline=None)
@given(cases())
def test_transposed_sums_over_windows(case):
    """<sum over windows of x, y> = <x, transposed y>."""
    window = Window.of(case.weight.dim() - 2, case.weight.shape[2:], case.stride, case.padding, case.rest["dilation"])
    x = case.x[:, :1].detach().contiguous()
    sums = window.unfold(x).flatten(x.dim()).sum(-1)
    y = torch.cos(torch.arange(sums.numel(), dtype=x.dtype)).reshape(sums.shape)
    close((sums * y).sum(), (x * windows_transposed(y, x.shape[2:], window)).sum())
