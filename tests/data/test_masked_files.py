import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from knlightning.data import MaskedFiles
from knlightning.data.samplers import ExactIndex, SeededIndex


def masked(folder, mode="L", damage=()):
    """Two images of 3x2 pixels and their masks, of which 7 means class 1 and 9 and 200 do not count."""
    for number in range(2):
        mask = Image.fromarray(np.array([[7, 7, 9], [9, 200, 7]], np.uint8))
        if mode == "P":
            mask.putpalette([*range(255, -1, -1)] * 3)
        Image.new("RGB", (3, 2), (number, 2, 3)).save(folder / f"image {number}.png")
        mask.save(folder / f"mask {number}.png")
    for name in damage:
        (folder / name).write_bytes((folder / name).read_bytes()[:20])
    paths = ([str(folder / f"{kind} {number}.png") for number in range(2)] for kind in ("image", "mask"))
    classes = {7: 1, 8: 2, 9: 255, 200: 255}
    strata = torch.tensor([4, 5])
    return MaskedFiles(*paths, classes, lambda image, labels: (image + 1, labels + 1), strata, 2, bool(damage))


@pytest.mark.parametrize("mode", ["L", "P"])
def test_masks_are_mapped_by_their_numbers_and_not_by_the_colours_of_a_palette(tmp_path, mode):
    files = masked(tmp_path, mode)
    with Image.open(tmp_path / "mask 0.png") as mask:
        assert mask.mode == mode
    files.check_masks(range(2))
    image, labels = files[1]
    assert image.flatten(1)[:, 0].tolist() == [1, 2, 3]
    assert labels.tolist() == [[1, 1, 255], [255, 255, 1]]
    image, labels = files[SeededIndex(0, 0, 1, 0)]
    assert type(image) is type(labels) is Tensor
    assert image.flatten(1)[:, 0].tolist() == [2, 3, 4]
    assert labels.tolist() == [[2, 2, 0], [0, 0, 2]]


def test_a_part_of_the_files_is_taken_without_touching_the_whole(tmp_path):
    files = masked(tmp_path)
    part = files.take(torch.tensor([1]))
    assert (len(part), len(files)) == (1, 2)
    assert part.strata.tolist() == [5]
    assert torch.equal(part[0][0], files[1][0])
    assert part.sizes.tolist() == [[3, 2]]


@pytest.mark.parametrize("damaged", ["image 0.png", "mask 0.png"])
def test_images_that_cannot_be_read_or_have_no_mask_are_skipped_and_told(tmp_path, damaged):
    files = masked(tmp_path, damage=[damaged])
    files.check_masks(range(2))
    files.check_eval_batch_size(2)
    assert files[0] is files[ExactIndex(0, 0, 0, 0)] is None
    assert files[SeededIndex(0, 0, 0, 0)][0][0, 0, 0] == 2  # the other one takes its place
    assert [part.shape for part in files.empty_batch()] == [(0, 3, 2, 3), (0, 2, 3)]
    assert files.take(torch.tensor([1, 0])).damaged.tolist() == [False, True]
    with pytest.warns(UserWarning, match=r"1 of the 2 images could not be read so far.*image 0\.png\.$"):
        files.report()
    with pytest.raises(ValueError, match="none of the 2 images can be read"):
        masked(tmp_path, damage=[damaged, "image 1.png"])
