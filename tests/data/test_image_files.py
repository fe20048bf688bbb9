import pickle
from functools import partial

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from knlightning.data import BaseDataModule, ImageFiles
from knlightning.data.decoding import fitted
from knlightning.data.samplers import ExactIndex, SeededIndex


@pytest.fixture
def folder(tmp_path):
    """Ten images whose red is their number."""
    for number in range(10):
        Image.new("RGB", (9, 8), (number, 10 * number, 200)).save(tmp_path / f"ü {number}.png")
    return tmp_path


def files(folder, skip_damaged=False):
    return ImageFiles(
        folder,
        [f"ü {number}.png" for number in range(10)],
        torch.arange(10) // 5,
        v2.RandomCrop(4),
        partial(fitted, size=(6, 6), resize=None),
        skip_damaged=skip_damaged,
    )


def test_training_and_evaluation_have_forms_of_their_own(folder):
    for index, shape in ((7, (3, 6, 6)), (SeededIndex(0, 0, 7, 0), (3, 4, 4))):
        image, label = files(folder)[index]
        assert (tuple(image.shape), image[0, 0, 0].item(), label) == (shape, 7, 1)


def test_a_subset_has_its_own_files_labels_and_damage(folder):
    whole = files(folder)
    subset = whole.take(torch.tensor([6, 2]))
    assert subset.strata.tolist() == [1, 0]
    assert [subset[n][0][0, 0, 0].item() for n in range(2)] == [6, 2]
    subset.damaged[0] = True
    assert not whole.damaged.any()


def test_damaged_files_are_skipped_and_reported_once(folder):
    (folder / "ü 3.png").write_bytes(b"")
    images = files(folder, skip_damaged=True)
    assert images[3] is None
    assert images[SeededIndex(0, 0, 3, 0)][0][0, 0, 0] == 4
    with pytest.warns(UserWarning, match=r"1 of the 10 images could not be read so far.*ü 3\.png\.$"):
        images.report()
    images.report()
    assert [len(part) for part in images.collate([None, images[4]])] == [1, 1]
    assert [len(part) for part in images.collate([None])] == [0, 0]
    with pytest.raises(ValueError, match=r"ü 3\.png: cannot be read as an image"):
        files(folder)[3]


def test_nothing_but_damaged_images_is_an_error(folder):
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{folder}: none of the 10 images can be read"):
        files(folder, skip_damaged=True)[SeededIndex(0, 0, 5, 0)]


def test_names_are_one_block_of_memory_and_survive_pickling(folder):
    images = files(folder)
    assert images.images.paths.dtype.kind == "S"
    copy = pickle.loads(pickle.dumps(images))
    assert copy.path_of(9) == str(folder / "ü 9.png")
    assert torch.equal(copy[SeededIndex(0, 0, 9, 0)][0], images[SeededIndex(0, 0, 9, 0)][0])


def test_a_datamodule_of_ones_own_augments_while_training(folder):
    class OwnDataModule(BaseDataModule):
        class_names, mean, std, image_size = ("dark", "light"), (0.5,) * 3, (0.2,) * 3, (6, 6)

        def load(self, split):
            return files(folder)

    data = OwnDataModule(num_workers=0)
    data.setup("fit")
    assert next(iter(data.train_dataloader()))[0].shape == (10, 3, 4, 4)
    assert next(iter(data.val_dataloader()))[0].shape == (10, 3, 6, 6)


def test_nothing_takes_the_place_of_a_damaged_image_where_none_may(folder):
    (folder / "ü 3.png").write_bytes(b"")
    images = files(folder, skip_damaged=True)
    assert images[ExactIndex(0, 0, 3, 0)] is None
    assert torch.equal(images[ExactIndex(0, 0, 4, 0)][0], images[SeededIndex(0, 0, 4, 0)][0])
    with pytest.raises(ValueError, match=r"ü 3\.png"):
        files(folder)[ExactIndex(0, 0, 3, 0)]


def test_memory_that_is_lacking_is_named_and_skipped(folder):
    def hungry(_):
        raise MemoryError

    images = files(folder)
    images.evaluation = hungry
    with pytest.raises(ValueError, match=r"ü 3\.png: .*not enough memory"):
        images[3]
    images.skip_damaged = True
    assert images[3] is None


def test_an_error_of_a_transform_is_no_damage(folder):
    def wrong(_):
        raise ValueError("wrong size")

    images = files(folder, skip_damaged=True)
    images.evaluation = wrong
    with pytest.raises(ValueError, match="wrong size"):
        images[3]


def test_a_batch_of_none_has_the_shape_of_others(folder):
    images, labels = files(folder).empty_batch()
    assert (images.shape, images.dtype, labels.shape, labels.dtype) == ((0, 3, 6, 6), torch.uint8, (0,), torch.int64)
