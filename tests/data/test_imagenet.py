import pytest
from standins import write_imagenet

from knlightning.data import ImageNetDataModule


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    write_imagenet(root)
    return root


def test_reads_a_thousand_classes_by_their_english_names(root):
    data = ImageNetDataModule(root, num_workers=0)
    data.setup("fit")
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (32, 3, 224, 224)
    assert labels.tolist() == list(range(32))
    assert data.scaling == "standard"
    assert data.num_classes == len(set(data.class_names)) == 1000
    names = {0: "tench", 134: "crane bird", 207: "golden retriever", 517: "crane", 999: "toilet tissue"}
    assert {number: data.class_names[number] for number in names} == names


def test_other_folders_are_refused(tmp_path):
    write_imagenet(tmp_path, classes=999)
    for found in ("999", "1000, among them cat"):
        said = rf"{tmp_path / 'train'}: ImageNet has 1000 folders .*; found {found}\. .* ImageFold"
        with pytest.raises(ValueError, match=said):
            ImageNetDataModule(tmp_path).setup("fit")
        (tmp_path / "train" / "cat").mkdir(exist_ok=True)


def test_exif_data_do_not_count(root):
    assert not ImageNetDataModule.upright
