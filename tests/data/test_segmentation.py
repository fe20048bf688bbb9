import numpy as np
import pytest
import torch
from PIL import Image
from standins import write_image_folder
from torch import Tensor
from torchvision import tv_tensors

from knlightning.data import SegmentationDataModule
from knlightning.data.datasets import TensorImages
from knlightning.data.mask_transforms import PadRightBottom, RandomScale
from knlightning.data.masked_files import MaskedFiles
from knlightning.data.samplers import SeededIndex


class StripesDataModule(SegmentationDataModule):
    """A dataset of one's own: three images, 6 pixels high and 8 wide, whose lines are of one class each."""

    class_names = ("even", "odd")
    palette = ((0, 0, 0), (255, 255, 255))
    label_ids = (0, 1)
    mean = (0.2, 0.5, 0.8)
    std = (0.1, 0.2, 0.3)
    image_size = (6, 8)

    def load(self, split):
        labels = (torch.arange(6) % 2).to(torch.uint8).view(1, 6, 1).repeat(3, 1, 8)
        labels[:, 0] = 255
        return TensorImages(torch.full((3, 3, 6, 8), 51, dtype=torch.uint8), labels)


def test_batches_as_they_reach_the_task():
    data = StripesDataModule(batch_size=2, scaling="standard")
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batches = [data.on_after_batch_transfer(batch, 0) for batch in loader]
        assert [len(images) for images, _ in batches] == [2, 1]
        images, labels = batches[0]
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        torch.testing.assert_close(images[0, :, 0, 0], torch.tensor([0.0, -1.5, -2.0]))
        assert labels[0, :, 3].tolist() == [data.ignore_index, 1, 0, 1, 0, 1]


def test_images_can_be_held_out_without_regard_to_their_labels():
    data = StripesDataModule(batch_size=2, val_split=0.34)
    data.setup("fit")
    assert [len(loader.dataset) for loader in (data.train_dataloader(), data.val_dataloader())] == [1, 2]
    assert next(iter(data.val_dataloader()))[1].shape == (2, 6, 8)


def test_images_to_predict_on_come_one_by_one_at_their_own_size(tmp_path):
    write_image_folder(tmp_path, ("a",), count=1, size=(40, 30))
    Image.new("L", (5, 7), 51).save(tmp_path / "b.png")
    data = StripesDataModule(batch_size=2, scaling="standard", predict_dir=tmp_path, num_workers=0)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert [paths for _, paths in batches] == [
        [str(tmp_path / name)] for name in ("b.png", "train/a/0.png", "val/a/0.png")
    ]
    assert [tuple(images.shape) for images, _ in batches] == [(1, 3, 7, 5), (1, 3, 30, 40), (1, 3, 30, 40)]
    scaled, paths = data.on_after_batch_transfer(batches[0], 0)
    torch.testing.assert_close(scaled[0, :, 6, 4], torch.tensor([0.0, -1.5, -2.0]))
    assert paths == batches[0][1]


def masked(folder, mode="L"):
    """Two images of 3x2 pixels and their masks, of which 7 means class 1 and 9 and 200 do not count."""
    for number in range(2):
        mask = Image.fromarray(np.array([[7, 7, 9], [9, 200, 7]], np.uint8))
        if mode == "P":
            mask.putpalette([*range(255, -1, -1)] * 3)
        Image.new("RGB", (3, 2), (number, 2, 3)).save(folder / f"image {number}.png")
        mask.save(folder / f"mask {number}.png")
    paths = ([str(folder / f"{kind} {number}.png") for number in range(2)] for kind in ("image", "mask"))
    classes = {7: 1, 8: 2, 9: 255, 200: 255}
    return MaskedFiles(*paths, classes, lambda image, labels: (image + 1, labels + 1), torch.tensor([4, 5]), 2)


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


def test_ranges_of_numbers_are_told(tmp_path):
    files = masked(tmp_path)
    Image.new("L", (3, 2), 10).save(tmp_path / "mask 1.png")
    files.check_masks([0])
    with pytest.raises(ValueError, match=r"mask 1\.png: 6 pixels .*: 10\. Numbers with a label are 7 to 9, 200\.$"):
        files.check_masks(range(2))


def test_an_image_and_its_mask_are_scaled_alike():
    rows = torch.arange(10, dtype=torch.uint8).view(10, 1).expand(10, 20) * 20
    torch.manual_seed(0)
    sizes = set()
    for _ in range(60):
        image, mask = RandomScale(0.5, 1.5, 0.5)(tv_tensors.Image(rows[None].clone()), tv_tensors.Mask(rows.clone()))
        assert isinstance(image, tv_tensors.Image)
        assert isinstance(mask, tv_tensors.Mask)
        assert image.shape[1:] == mask.shape
        assert {*mask.unique().tolist()} <= {*rows.unique().tolist()}
        # half a pixel of the coarser grid is what interpolation and choice of the nearest pixel differ by
        assert (image[0].int() - mask.int()).abs().max() <= 20
        sizes.add(tuple(mask.shape))
    assert sizes == {(5, 10), (10, 20), (15, 30)}
    tiny, _ = RandomScale(0.1, 0.1, None)(tv_tensors.Image(rows[None, :2, :4]), tv_tensors.Mask(rows[:2, :4]))
    assert tiny.shape == (1, 1, 1)


def test_padding_is_black_to_the_right_and_below_and_does_not_count():
    image, mask = torch.full((3, 2, 3), 9, dtype=torch.uint8), torch.full((2, 3), 4, dtype=torch.uint8)
    for size in ((4, 5), (1, 5), (4, 1), (1, 1)):
        padded, labels = PadRightBottom(size)(tv_tensors.Image(image), tv_tensors.Mask(mask))
        height, width = max(2, size[0]), max(3, size[1])
        expected = torch.full((height, width), 255, dtype=torch.uint8)
        expected[:2, :3] = 4
        assert torch.equal(labels.as_subclass(Tensor), expected)
        assert torch.equal(padded.as_subclass(Tensor), (expected == 4).expand(3, -1, -1) * torch.tensor(9).byte())
