import torch
from PIL import Image
from standins import write_image_folder

from knlightning.data import SegmentationDataModule
from knlightning.data.datasets import TensorImages


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
