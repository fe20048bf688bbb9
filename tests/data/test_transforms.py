import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from torchvision.transforms import v2

from knlightning.data import random_crop, random_erasing, random_horizontal_flip

dtypes = st.sampled_from([torch.uint8, torch.float32])


def numbered(count, channels, height, width, dtype):
    """Images in which no pixel is 0 and neighbours differ, so that a window can be told from any other."""
    pixels = torch.arange(count * channels * height * width).view(count, channels, height, width)
    return (pixels % 251 + 1).to(dtype)


@given(st.integers(0, 4), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 4), dtypes)
def test_every_crop_is_a_window_of_the_padded_image(count, channels, height, width, padding, dtype):
    images = numbered(count, channels, height, width, dtype)
    crops = random_crop(images, padding)
    assert crops.shape == images.shape
    assert crops.dtype == dtype
    for image, crop in zip(images, crops, strict=True):
        padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=dtype)
        padded[:, padding : padding + height, padding : padding + width] = image
        windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # (C, 2p + 1, 2p + 1, H, W)
        assert any(
            torch.equal(windows[:, top, left], crop)
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
        )


def test_offsets_are_uniform_and_each_image_has_its_own():
    torch.manual_seed(0)
    padding, count = 2, 10_000
    image = numbered(1, 1, 7, 11, torch.uint8)
    crops = random_crop(image.expand(count, -1, -1, -1), padding)
    padded = torch.nn.functional.pad(image, [padding] * 4)[0, 0]
    windows = padded.unfold(0, 7, 1).unfold(1, 11, 1).reshape(25, 1, 7, 11)
    offset = (crops.unsqueeze(1) == windows).flatten(2).all(-1)  # (N, 25): which window each crop is
    assert torch.equal(offset.sum(1), torch.ones(count, dtype=torch.long))
    observed = offset.sum(0).double()
    chi_square = ((observed - count / 25) ** 2 / (count / 25)).sum().item()
    assert chi_square < 51.2  # 99.9 % quantile with 24 degrees of freedom


def test_negative_padding_is_an_error():
    with pytest.raises(ValueError, match=r"^padding must be a whole number at least 0, got -1$"):
        random_crop(torch.zeros(1, 1, 2, 2), -1)


@given(st.integers(0, 5), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), dtypes)
def test_every_image_is_itself_or_its_mirror_image(count, channels, height, width, dtype):
    images = numbered(count, channels, height, width, dtype)
    flipped = random_horizontal_flip(images)
    assert flipped.dtype == dtype
    for image, after in zip(images, flipped, strict=True):
        assert torch.equal(after, image) or torch.equal(after, image.flip(2))


def test_half_of_the_images_are_flipped():
    torch.manual_seed(0)
    count = 10_000
    images = torch.tensor([0, 1], dtype=torch.uint8).expand(count, 1, 1, 2)
    flips = int(random_horizontal_flip(images)[:, 0, 0, 0].sum())
    assert abs(flips - count / 2) < 4 * math.sqrt(count / 4)  # four standard deviations of the binomial distribution


@pytest.mark.parametrize("transform", [lambda images: random_crop(images, 3), random_horizontal_flip])
def test_the_seed_repeats_the_draw(transform):
    assert callable(transform)
    images = numbered(50, 2, 5, 6, torch.uint8)
    torch.manual_seed(1)
    first = transform(images)
    second = transform(images)
    torch.manual_seed(1)
    assert torch.equal(transform(images), first)
    assert not torch.equal(second, first)


@pytest.mark.parametrize(("height", "width"), [(16, 24), (2, 30)])  # of the latter many rectangles do not fit
def test_erased_rectangles_are_those_of_torchvision(height, width):
    torch.manual_seed(0)
    count = 1500
    images = numbered(1, 3, height, width, torch.uint8).expand(count, -1, -1, -1)
    erased = random_erasing(images, 0.75, (0, 0, 0))
    transform = v2.RandomErasing(0.75)
    reference = torch.stack([transform(image) for image in images])
    shares = []
    for batch in (erased, reference):
        mask = (batch == 0).all(1)
        assert torch.equal(batch, images * ~mask[:, None])
        rows, columns = mask.any(2), mask.any(1)
        assert torch.equal(mask, rows[:, :, None] & columns[:, None, :])  # a rectangle, or nothing
        shares.append([mask.float().mean(0), rows.sum(1), columns.sum(1), mask.any((1, 2)).float().mean()])
    (ours, our_rows, our_columns, ours_any), (theirs, their_rows, their_columns, theirs_any) = shares
    assert (ours - theirs).abs().max() < 0.09  # five standard deviations of a pixel's share
    assert abs(ours_any - theirs_any) < 0.09
    assert ks_2samp(our_rows, their_rows, method="asymp").pvalue > 1e-3
    assert ks_2samp(our_columns, their_columns, method="asymp").pvalue > 1e-3


def test_no_image_and_all_images_are_erased():
    images = numbered(50, 3, 9, 9, torch.float32)
    assert torch.equal(random_erasing(images, 0, (0, 0, 0)), images)
    erased = random_erasing(images, 1, (0.5, 1.5, 2.5))
    changed = (erased != images).any(1)
    assert changed.any((1, 2)).all()
    assert erased[changed[:, None].expand_as(erased)].unique().tolist() == [0.5, 1.5, 2.5]
    assert random_erasing(images[:0], 1, (0, 0, 0)).shape == (0, 3, 9, 9)
    with pytest.raises(ValueError, match=r"^probability must be a number at least 0 and at most 1, got 2"):
        random_erasing(images, 2, (0, 0, 0))
