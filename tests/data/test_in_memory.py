import numpy as np
import pytest
import torch
from PIL import Image

from knlightning.data import ImageDataModule


class ColoursDataModule(ImageDataModule):
    """Random images of 2x4 pixels, mirrored while training."""

    class_names = ("red", "green", "blue")
    mean, std, image_size = (0.5, 0.5, 0.5), (0.1, 0.2, 0.3), (2, 4)

    def read(self, train):
        images = torch.randint(0, 256, (12, 3, 2, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        return images, torch.arange(12) % 3

    def augmentation(self, images):
        return images.flip(-1)


def test_images_in_memory_are_not_sent_between_processes(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    data = ColoursDataModule(num_workers=2, val_split=0.25, predict_dir=tmp_path)
    for stage in ("fit", "test", "predict"):
        data.setup(stage)
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader())
    assert [loader.num_workers for loader in loaders] == [0, 0, 0, 2]


@pytest.mark.parametrize("augment", [True, False])
def test_training_images_are_augmented_unless_switched_off(augment):
    data = ColoursDataModule(augment=augment)
    images, _ = data.read(True)
    assert torch.equal(data.prepared(images, train=True), (images.flip(-1) if augment else images) / 255)
    assert torch.equal(data.prepared(images, train=False), images / 255)


def test_images_stay_as_they_are_if_the_dataset_says_no_augmentation():
    class Plain(ColoursDataModule):
        augmentation = ImageDataModule.augmentation

    images, _ = Plain().read(True)
    assert torch.equal(Plain().prepared(images, train=True), images / 255)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            np.zeros((4, 3, 2, 2), np.float32),
            [0, 1, 2, 0],
            r"uint8 of shape \(N, 3, H, W\) is needed, got torch.float32",
        ),
        (np.zeros((4, 2, 2, 3), np.uint8), [0, 1, 2, 0], r"got torch.uint8 of shape \(4, 2, 2, 3\)"),
        (np.zeros((4, 3, 2, 2), np.uint8), [0, 1, 2], r"got 4 images, labels torch.int64 of shape \(3,\)"),
        (np.zeros((0, 3, 2, 2), np.uint8), [], "at least one image"),
        (np.zeros((4, 3, 2, 2), np.uint8), [0, 1, 2, 3], "labels must be 0 to 2, got 0 to 3"),
        (np.zeros((4, 3, 2, 2), np.uint8), [0, -1, 2, 1], "labels must be 0 to 2, got -1 to 2"),
    ],
)
def test_what_a_subclass_reads_is_checked(images, labels, message):
    class Broken(ColoursDataModule):
        def read(self, train):
            return torch.from_numpy(images), torch.tensor(labels, dtype=torch.int64)

    with pytest.raises(ValueError, match=f"Broken, test images: .*{message}"):
        Broken().setup("test")
