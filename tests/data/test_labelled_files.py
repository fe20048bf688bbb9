import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from knlightning.data.image_files import ImageFiles
from knlightning.data.labelled_files import ATTEMPTS, LabelledFilesDataModule, RandomCropAndFlip, random_part


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


@pytest.mark.parametrize(("height", "width"), [(30, 40), (90, 17)])
def test_random_parts_are_distributed_as_those_of_torchvision(height, width):
    torch.manual_seed(0)
    reference = v2.RandomResizedCrop(8)
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    draws = torch.rand(4000, 4 * ATTEMPTS, dtype=torch.float64).tolist()
    found = torch.tensor([random_part(height, width, each) for each in draws])
    params = [reference.make_params([image]) for _ in range(4000)]
    expected = torch.tensor([[each[name] for name in ("top", "left", "height", "width")] for each in params])
    for one, other in zip(found.T, expected.T, strict=True):
        # the largest distance of the two distributions (Smirnov); 0.05 is passed in one of 10,000 cases
        counts = torch.stack([part.bincount(minlength=100) for part in (one, other)]).cumsum(1) / 4000
        assert (counts[0] - counts[1]).abs().max() < 0.05


def test_a_part_is_scaled_and_half_of_them_are_mirrored():
    torch.manual_seed(0)
    image = torch.randint(256, (3, 30, 40), dtype=torch.uint8)
    mirrored = 0
    for seed in range(200):
        torch.manual_seed(seed)
        draws = torch.rand(4 * ATTEMPTS + 1, dtype=torch.float64).tolist()
        expected = tv.resized_crop(image, *random_part(30, 40, draws[:-1]), [8, 8])
        torch.manual_seed(seed)
        part = RandomCropAndFlip(8)(image)
        mirrored += not torch.equal(part, expected)
        assert torch.equal(part, expected) or torch.equal(part, expected.flip(-1))
    assert 80 < mirrored < 120
