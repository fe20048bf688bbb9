import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn import naive

from knlightning.nn import LocalContextNorm2d, local_context_norm


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(0, 2),
    groups=st.integers(1, 3),
    depth=st.integers(1, 3),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    window=st.tuples(st.integers(1, 15), st.integers(1, 15)),
    mean=st.sampled_from([0.0, 5.0]),
    seed=st.integers(0, 2**31),
)
def test_follows_the_definition(batch, groups, depth, size, window, mean, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, groups * depth, *size, dtype=torch.float64, generator=generator) + mean
    y = local_context_norm(x, groups, window)
    # a window of one element has no variance: 1 / sqrt(eps) magnifies the rounding of the reference itself
    torch.testing.assert_close(y, naive.local_context_norm(x, groups, window), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("shape", "groups", "window"), [((2, 4, 4, 5), 2, (3, 4)), ((1, 2, 3, 3), 1, 227), ((2, 2, 1, 1), 2, 3)]
)
def test_gradient(shape, groups, window):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (shape, shape[1:2], shape[1:2]))
    assert torch.autograd.gradcheck(
        lambda x, weight, bias: local_context_norm(x, groups, window, 1e-2, weight, bias), (x, weight, bias)
    )


def test_windows_that_hold_all_of_the_image_make_it_group_normalization():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, 7)
    torch.testing.assert_close(local_context_norm(x, 3, (9, 13)), torch.nn.functional.group_norm(x, 3))
    assert not torch.allclose(local_context_norm(x, 3, (8, 13)), torch.nn.functional.group_norm(x, 3), atol=1e-3)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_mean_that_is_large_beside_the_spread(memory_format):
    torch.manual_seed(0)
    x = (torch.randn(1, 4, 12, 16) + 1e4).to(memory_format=memory_format)
    y = local_context_norm(x, 2, 5)
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y.double(), naive.local_context_norm(x.double(), 2, (5, 5)), rtol=0, atol=3e-3)


def test_what_is_far_away_does_not_spoil_a_window():
    torch.manual_seed(0)
    x = torch.randn(1, 4, 16, 24)
    x[:, :, :, :8] *= 1e4
    expected = naive.local_context_norm(x.double(), 2, (5, 5))
    torch.testing.assert_close(local_context_norm(x, 2, 5).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision(dtype, atol):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 7, 6).to(dtype)
    layer = LocalContextNorm2d(4, window=(3, 5))
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), naive.local_context_norm(x.double(), 2, (3, 5)), rtol=0, atol=atol)


def test_layer_scales_and_shifts_channels():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 6)
    layer = LocalContextNorm2d(4, groups=2, window=3, eps=0.1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0, 3.0, -4.0]))
        layer.bias.copy_(torch.tensor([0.0, -1.0, 5.0, 2.0]))
    expected = local_context_norm(x, 2, 3, 0.1) * layer.weight.view(4, 1, 1) + layer.bias.view(4, 1, 1)
    torch.testing.assert_close(layer(x), expected)
    assert repr(layer) == "LocalContextNorm2d(4, groups=2, window=(3, 3), eps=0.1)"
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_export():
    layer = LocalContextNorm2d(4, window=5)
    x = torch.randn(2, 4, 9, 8)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    other = torch.randn(5, 4, 9, 8)
    torch.testing.assert_close(program.module()(other), layer(other))


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"^groups must be a divisor of the number of channels, 5, got 2$"):
        LocalContextNorm2d(5)
    with pytest.raises(ValueError, match=r"^groups must be .* channels, 4, got 3$"):
        local_context_norm(torch.ones(1, 4, 3, 3), 3)
    with pytest.raises(ValueError, match=r"^window must be a whole number at least 1, or 2 of them"):
        LocalContextNorm2d(4, window=(3, 0))
    with pytest.raises(ValueError, match=r"^input's shape must be \[N, C, H, W\], got \(4, 3, 3\)$"):
        local_context_norm(torch.ones(4, 3, 3))
