import pytest
import torch
from nn import naive

from knlightning.nn import PositionalNorm2d, positional_norm


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 7, 1, 1), (2, 1, 3, 3), (0, 3, 4, 4)])
def test_each_position_is_normalized_over_its_channels(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    torch.testing.assert_close(positional_norm(x), naive.positional_norm(x))
    torch.testing.assert_close(positional_norm(x, 0.5), naive.positional_norm(x, 0.5))


def test_gradient():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(positional_norm, (x,))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_mean_that_is_large_beside_the_spread(memory_format):
    torch.manual_seed(0)
    x = (torch.randn(2, 16, 5, 6) + 1e4).to(memory_format=memory_format)
    torch.testing.assert_close(positional_norm(x).double(), naive.positional_norm(x.double()), rtol=0, atol=3e-3)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision(dtype, atol):
    torch.manual_seed(0)
    x = torch.randn(2, 16, 5, 6).to(dtype)
    y = positional_norm(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), naive.positional_norm(x.double()), rtol=0, atol=atol)


def test_layer_scales_and_shifts_channels():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5)
    layer = PositionalNorm2d(3, eps=0.1)
    assert torch.equal(layer(x), positional_norm(x, 0.1))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
        layer.bias.copy_(torch.tensor([0.0, -1.0, 5.0]))
    expected = positional_norm(x, 0.1) * layer.weight.view(3, 1, 1) + layer.bias.view(3, 1, 1)
    torch.testing.assert_close(layer(x), expected)
    assert not list(PositionalNorm2d(3, affine=False).parameters())
