from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from knlightning.models import fcn_knresnet8
from knlightning.tasks.inference import averaged_logits, by_tiles, window_starts

IMAGES = torch.rand(2, 3, 11, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def network():
    """Neither symmetric, nor blind to where in a window a pixel lies."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Softplus(), nn.Conv2d(4, 5, 3, padding=1)).double()


@given(size=st.integers(1, 40), window=st.integers(1, 45), data=st.data())
def test_windows_cover_a_side_and_end_at_its_end(size, window, data):
    stride = data.draw(st.integers(1, window))
    starts = window_starts(size, window, stride)
    assert {place for start in starts for place in range(start, min(start + window, size))} == set(range(size))
    assert starts[0] == 0
    assert starts[-1] == max(size - window, 0)
    assert all(0 < after - before <= stride for before, after in pairwise(starts))
    assert len(starts) == 1 + max(0, -(-(size - window) // stride))  # no more than are needed


@pytest.mark.parametrize("window", [(4, 6), (5, 17), (11, 3), (20, 4), (1, 1)])
@pytest.mark.parametrize("stride", [(1, 1), (3, 2), None])
def test_windows_equal_a_naive_mean_over_windows(network, window, stride):
    if stride and (stride[0] > window[0] or stride[1] > window[1]):
        stride = window
    network.requires_grad_(False)
    result = averaged_logits(network, IMAGES, window, stride)
    step = stride or tuple(-(-side // 2) for side in window)
    starts = [
        [min(start, max(0, size - length)) for start in range(0, max(size - length, 0) + every, every)]
        for size, length, every in zip((11, 17), window, step, strict=True)
    ]
    windows = {
        (top, left): network(IMAGES[:, :, top : top + window[0], left : left + window[1]])
        for top, left in product(*starts)
    }
    expected = torch.zeros(2, 5, 11, 17, dtype=torch.float64)
    for row, column in product(range(11), range(17)):
        seen = [
            logits[:, :, row - top, column - left]
            for (top, left), logits in windows.items()
            if 0 <= row - top < window[0] and 0 <= column - left < window[1]
        ]
        expected[:, :, row, column] = sum(seen) / len(seen)
    torch.testing.assert_close(result, expected)


def test_order_of_scales_flips_and_windows(network):
    scales, window = (0.5, 1.0, 1.5), (4, 6)
    result = averaged_logits(network, IMAGES, window, None, True, scales)
    expected = 0
    for scale in scales:
        size = (round(11 * scale), round(17 * scale))
        resized = F.interpolate(IMAGES, size, mode="bilinear", antialias=True) if scale != 1 else IMAGES
        straight = averaged_logits(network, resized, window)
        mirrored = averaged_logits(network, resized.flip(3), window).flip(3)
        expected = expected + F.interpolate((straight + mirrored) / 2, (11, 17), mode="bilinear") / 3
    torch.testing.assert_close(result, expected)


def test_what_changes_nothing_changes_nothing():
    torch.manual_seed(0)
    network = fcn_knresnet8(num_classes=4).eval()
    images = IMAGES.float()
    with torch.no_grad():
        plain = network(images)
        for window in (None, (11, 17), (100, 17)):
            assert torch.equal(averaged_logits(network, images, window, None, False, (1.0,)), plain)
        assert not torch.equal(averaged_logits(network, images, (10, 17)), plain)


def test_mirrored_images_have_mirrored_logits(network):
    one, other = (averaged_logits(network, images, flip=True) for images in (IMAGES, IMAGES.flip(3)))
    torch.testing.assert_close(one, other.flip(3))
    assert not torch.allclose(network(IMAGES), network(IMAGES.flip(3)).flip(3))


@pytest.mark.parametrize("options", [{"window": (4, 6)}, {"flip": True}, {"scales": (1.0, 2.0)}])
def test_images_stay_what_they_are_and_half_precision_is_summed_in_single(options):
    images = IMAGES.bfloat16() if "scales" not in options else IMAGES.clone()
    before = images.clone()
    logits = averaged_logits(nn.Identity(), images, **options)  # returns its very input
    assert torch.equal(images, before)
    assert logits.dtype == (torch.float32 if images.dtype == torch.bfloat16 else torch.float64)


def test_tiny_images_survive_small_scales(network):
    assert averaged_logits(network, IMAGES[..., :1, :2], scales=(0.1, 1.0)).shape == (2, 5, 1, 2)


@pytest.mark.parametrize("size", [(96, 160), (8, 300), (97, 161), (64, 64)])
def test_tiles_with_enough_margin_equal_the_whole_image(size):
    torch.manual_seed(0)
    convs = nn.Conv2d(3, 4, 3, padding=2, dilation=2), nn.Conv2d(4, 5, 5, padding=2), nn.Conv2d(5, 2, 3, padding=1)
    network = nn.Sequential(*convs[:2], nn.Softplus(), convs[2])
    images = torch.rand(2, 3, *size)
    seen = []

    def watched(part):
        seen.append(part.shape[-1])
        return (network(part),)

    with torch.no_grad():
        whole = network(images)
        torch.testing.assert_close(by_tiles(watched, images, tile=64, margin=8), (whole,))
        assert max(seen) <= 64
        assert not torch.allclose(by_tiles(watched, images, tile=48, margin=4)[0], whole)  # 5 would do
        label_maps, red = by_tiles(lambda a, b: (network(a).argmax(1), b[:, 0]), images, images, tile=64, margin=8)
    assert torch.equal(label_maps, whole.argmax(1))
    assert torch.equal(red, images[:, 0])


def test_tiles_of_a_network_with_strides_equal_the_whole_image():
    torch.manual_seed(0)
    network = fcn_knresnet8(num_classes=4).eval()
    images = torch.rand(1, 3, 128, 192)
    with torch.no_grad():
        (tiled,) = by_tiles(lambda part: (network(part),), images, tile=160, margin=64)
        torch.testing.assert_close(tiled, network(images))


@pytest.mark.parametrize("options", [{}, {"window": (4, 6)}, {"flip": True, "scales": (0.5, 1.0)}])
def test_a_device_without_images_gives_none(options):
    network = fcn_knresnet8(num_classes=4).eval()
    with torch.no_grad():
        assert averaged_logits(network, IMAGES.float()[:0], **options).shape == (0, 4, 11, 17)
