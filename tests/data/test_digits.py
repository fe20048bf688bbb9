import pytest
import torch

from knlightning.data import DigitsDataModule


@pytest.fixture(scope="module")
def digits():
    data = DigitsDataModule(batch_size=100)
    data.setup("fit")
    return data


def test_parts_have_the_promised_form(digits):
    for train, count in ((True, 1437), (False, 360)):
        images, labels = digits.read(train)
        assert images.shape == (count, 3, 32, 32)
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert labels.shape == (count,)
        share = labels.bincount() / count
        assert share.shape == (10,)
        assert (share - 0.1).abs().max() < 0.01
    assert digits.num_classes == 10
    assert digits.class_names[7] == "7"


def test_parts_are_the_whole_set_and_do_not_overlap(digits):
    from sklearn.datasets import load_digits

    # scaling up moves a corner pixel onto itself, so the original's brightness can be summed up again
    original = torch.from_numpy(load_digits().images).float().unsqueeze(1)
    expected = torch.nn.functional.interpolate(original, scale_factor=4, mode="bilinear") * 255 / 16
    ours = torch.cat([digits.read(True)[0], digits.read(False)[0]])
    as_rows = {tuple(image[0].flatten().tolist()) for image in ours}
    assert as_rows == {tuple(image[0].flatten().round().int().tolist()) for image in expected}
    assert len(as_rows) == 1797  # no image occurs twice, so equal sets mean parts that do not overlap
    assert torch.equal(ours[:, 0], ours[:, 2])


def test_the_split_is_always_the_same(digits):
    assert torch.equal(DigitsDataModule().read(False)[0], digits.read(False)[0])


def test_stated_mean_and_standard_deviation(digits):
    pixels = digits.read(True)[0].double() / 255
    assert torch.allclose(pixels.mean((0, 2, 3)), torch.tensor(digits.mean).double(), atol=1e-4)
    assert torch.allclose(pixels.std((0, 2, 3)), torch.tensor(digits.std).double(), atol=1e-4)


def test_augmentation_shifts_and_never_mirrors(digits):
    torch.manual_seed(0)
    image = digits.read(True)[0][:1]
    padded = torch.nn.functional.pad(image, [2] * 4)
    shifts = {tuple(padded[0, 0, y : y + 32, x : x + 32].flatten().tolist()) for y in range(5) for x in range(5)}
    varied = {tuple(one[0].flatten().tolist()) for one in digits.augmentation(image.expand(500, -1, -1, -1))}
    assert varied == shifts
