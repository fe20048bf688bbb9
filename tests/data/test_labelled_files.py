import pytest
import torch
from PIL import Image

from knlightning.data.image_files import ImageFiles
from knlightning.data.labelled_files import LabelledFilesDataModule


class OneImage(LabelledFilesDataModule):
    class_names = ("cat",)

    def load(self, split):
        return ImageFiles(".", [f"{split}.png"], torch.zeros(1, dtype=torch.int64), self.augmentation, self.evaluation)


def test_a_subclass_says_where_images_lie_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        Image.new("RGB", (40, 30), "white").save(f"{split}.png")
    data = OneImage(train_size=8, eval_resize=20, eval_size=16, random_erasing=1.0, num_workers=0, predict_dir=tmp_path)
    data.setup("fit")
    data.setup("predict")
    for loader, size in ((data.train_dataloader(), 8), (data.val_dataloader(), 16), (data.predict_dataloader(), 16)):
        images, _ = next(iter(loader))
        assert images.shape[1:] == (3, size, size)
        assert (images == 255).all()
        # a part of a training image is erased
        assert (data.prepared(images, train=size == 8) == data.prepared(images, train=False)).all() == (size == 16)


def test_a_small_evaluation_image_is_refused():
    with pytest.raises(ValueError, match=r"^eval_resize must be a whole number at least 224, got 100"):
        OneImage(eval_resize=100)
