from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from experiments.loading import SingleImages, WholeBatches, measure, write_images

CELLS = 9 * 9 * 2


@pytest.mark.parametrize("kind", [WholeBatches, SingleImages])
def test_both_give_every_crop_and_its_mirror_image_equally_often(tmp_path, kind):
    """One image without symmetries, over and over: what became of it tells offsets and mirroring."""
    torch.manual_seed(0)
    image = torch.randint(1, 256, (3, 32, 32), dtype=torch.uint8)
    count = 50 * CELLS
    write_images(tmp_path, np.broadcast_to(image.numpy(), (count, 3, 32, 32)))
    windows = F.pad(image, [4] * 4).unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    cells = {window.numpy().tobytes(): cell for cell, window in enumerate(torch.cat([windows, windows.flip(-1)]))}
    assert len(cells) == CELLS
    observed = Counter()
    labels = Counter()
    for images, numbers in kind(tmp_path, 300, 0, "cpu"):
        assert images.dtype == torch.float32
        labels.update(numbers.tolist())
        observed.update(cells[one.numpy().tobytes()] for one in (images * 255).round().to(torch.uint8))
    assert labels == dict.fromkeys(range(100), count // 100)  # every image once
    assert sum((observed[cell] - 50) ** 2 / 50 for cell in range(CELLS)) < 221.0  # 99.9 % with 161 degrees of freedom


def test_both_read_the_same_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (200, 3, 32, 32), np.uint8)
    write_images(tmp_path, images)
    ours, theirs = WholeBatches(tmp_path, 64, 1, "cpu"), SingleImages(tmp_path, 64, 1, "cpu")
    np.testing.assert_array_equal(ours.data.read(train=True)[0].numpy(), images)
    np.testing.assert_array_equal(theirs.loader.dataset.data, images.transpose(0, 2, 3, 1))  # type: ignore[attr-defined]
    for batches in (ours, theirs):
        assert [len(labels) for _, labels in batches] == [64, 64, 64, 8]


@pytest.mark.slow
def test_whole_batches_are_ten_times_as_fast(capsys):
    ratios = measure(num_workers=(0,), images=4000, rounds=3)
    assert ratios[0] >= 10
    assert "| 0 | " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number at least 1"),
        ({"num_workers": [-1]}, "num_workers must be a list of numbers of at least 0"),
        ({"rounds": 0}, "rounds must be a whole number at least 1"),
        ({"images": 0}, "images must be a whole number at least 1"),
    ],
)
def test_wrong_arguments_are_named(argument, message):
    with pytest.raises(ValueError, match=message):
        measure(**argument)
