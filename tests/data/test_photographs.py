import sys

import pytest
import torch
from sklearn.neighbors import NearestCentroid

from knlightning.data import PhotographsDataModule, photographs


@pytest.fixture(scope="module")
def parts():
    data = PhotographsDataModule()
    return data.read(True), data.read(False)


def test_parts_have_the_promised_form(parts):
    for (images, labels), count in zip(parts, (1856, 618), strict=True):
        assert images.shape == (count, 3, 32, 32)
        assert images.dtype == torch.uint8
        assert (labels.dtype, labels.shape) == (torch.int64, (count,))
    train, test = (labels.bincount().tolist() for _, labels in parts)
    assert train == [120, 120, 120, 95, 120, 120, 81, 120, 120, 120, 120, 120, 120, 120, 120, 120]
    assert test == [40, 40, 40, 31, 40, 40, 27, 40, 40, 40, 40, 40, 40, 40, 40, 40]
    assert len(PhotographsDataModule.class_names) == 16


def test_the_patches_are_always_the_same(parts):
    torch.manual_seed(7)
    assert torch.equal(PhotographsDataModule().read(False)[0], parts[1][0])


def test_stated_mean_and_standard_deviation(parts):
    pixels = parts[0][0].double() / 255
    data = PhotographsDataModule
    assert torch.allclose(pixels.mean((0, 2, 3)), torch.tensor(data.mean).double(), atol=1e-4)
    assert torch.allclose(pixels.std((0, 2, 3)), torch.tensor(data.std).double(), atol=1e-4)


def test_mean_colour_does_not_tell_the_photograph(parts):
    (train, labels), (test, expected) = ((images.float().mean((2, 3)), labels) for images, labels in parts)
    assert NearestCentroid().fit(train, labels).score(test, expected) < 0.1  # guessing: 1 of 16


def test_no_pixel_is_both_trained_and_tested_on(monkeypatch):
    """Of 12 x 16 patches the 160 with the most contrast are used, each once."""
    torch.manual_seed(0)
    pixels = torch.randint(256, (12, 32, 16, 32, 3))
    pixels[0] = pixels[0] // 2  # 16 patches with less contrast than the others, and 16 with less still
    pixels[1] = pixels[1] // 4
    photograph = pixels.to(torch.uint8).view(12 * 32, 16 * 32, 3)
    monkeypatch.setattr(photographs, "read_photograph", lambda name: photograph)
    monkeypatch.setattr(photographs, "recoloured", lambda patches, generator: patches)
    data = PhotographsDataModule()
    images, labels = (torch.cat(both) for both in zip(data.read(True), data.read(False), strict=True))
    used = {tuple(image.flatten().tolist()) for image in images[labels == 3]}
    assert used == {tuple(row.flatten().tolist()) for row in pixels[2:].permute(0, 2, 4, 1, 3).flatten(0, 1)}


def test_augmentation_shifts_and_mirrors():
    torch.manual_seed(0)
    image = torch.randint(1, 256, (1, 3, 32, 32), dtype=torch.uint8)
    varied = PhotographsDataModule().augmentation(image.expand(200, -1, -1, -1))
    centres = {tuple(one[0, 12:20, 12:20].flatten().tolist()) for one in varied}
    shifts = [image[0, 0, y : y + 8, x : x + 8] for y in range(8, 17) for x in range(8, 17)]
    mirrored = [image.flip(-1)[0, 0, y : y + 8, x : x + 8] for y in range(8, 17) for x in range(8, 17)]
    assert centres <= {tuple(one.flatten().tolist()) for one in (*shifts, *mirrored)}
    assert len(centres) > 100


def test_without_scikit_image(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ValueError, match=r"missing: pip install 'knlightning\[photographs\]'"):
        photographs.read_photograph("coffee")
