import pytest
import torch

from knlightning.nn import fused_passes
from knlightning.nn.composite import Call, Settings
from knlightning.nn.fused_passes import mask_of_seed
from knlightning.nn.statistics import inflate, pixel_moments, window_moments, windows_transposed
from knlightning.nn.windows import Window

SEED = torch.tensor([12345])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_moments_of_several_blocks_where_the_mean_is_far_above_the_spread(memory_format):
    """As exact as float32 holds the input: nothing cancels, within and between the tiles of a program."""
    torch.manual_seed(0)
    x = (1e4 + torch.randn(1, 130, 4, 9)).contiguous(memory_format=memory_format)
    mean, var, rectified = fused_passes.pixel_moments(x, None, 0.0, True)
    exact_mean, exact_var = pixel_moments(x.double(), None, 0.0)
    assert torch.equal(rectified, x)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=2e-7, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-3, atol=0)
    dropped = fused_passes.pixel_moments(x, SEED, 0.3, False)[:2]
    torch.testing.assert_close(dropped, pixel_moments(x, mask_of_seed(SEED, x, 0.3), 0.3), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "window",
    [
        Window.of(1, 3, 2, 1, 2),
        Window.of(2, (2, 3), (1, 2), (2, 0, 1, 0), (2, 1)),
        Window.of(3, (1, 2, 3), (2, 1, 1), 1),
    ],
    ids=["1d", "2d", "3d"],
)
def test_windows_and_their_transpose(window):
    torch.manual_seed(0)
    size = (6, 5, 7)[: len(window.kernel_size)]
    moments = torch.randn(2, 1, *size), torch.rand(2, 1, *size)
    mean, rstd = fused_passes.window_moments(*moments, window, 1.1, 1e-2)
    expected_mean, var = inflate(*window_moments(*moments, window), 1.1)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(rstd, torch.rsqrt(var + 1e-2))
    maps = torch.randn(2, 2, *mean.shape[2:])
    d_input = torch.zeros(2, 3, *size)  # so that all that is added is seen
    x = torch.randn(2, 3, *size)
    settings, filters = Settings(window, 1, 0.0, 1.0, 1e-2, False, False), torch.empty(4, 3)
    call = Call(x, filters, None, None, None, settings)
    fused_passes.finish_gradient(call, d_input, None, maps, torch.empty(4))
    constant, slope = windows_transposed(maps, size, window).split(1, 1)
    torch.testing.assert_close(d_input, constant + slope * x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(32, 2048, 7, 7), (1, 3, 224, 224), (256, 64, 1, 1), (2, 1000, 100, 100)])
def test_tiles_fill_a_program_and_are_not_larger(shape, memory_format):
    tensor = torch.empty(shape, device="meta").contiguous(memory_format=memory_format)
    block_p, block_c = fused_passes._tile(tensor)
    assert block_c % 4 == 0  # channels that share random numbers lie in one tile
    assert block_p * block_c <= 4096
    assert block_p & (block_p - 1) == block_c & (block_c - 1) == 0
