import copy
import pickle
import shutil

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as EncodedImage
from PIL import Image
from standins import encoded, write_parquet

from knlightning.data import DigitsDataModule, HuggingFaceDataModule
from knlightning.data.samplers import SeededIndex

pytestmark = pytest.mark.usefixtures("no_network")
ORANGE = encoded(Image.new("RGB", (40, 30), "orange"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parquet") / "digits"
    write_parquet(folder)
    return folder


def module(path, **arguments):
    small = {"train_size": 32, "eval_resize": 32, "eval_size": 32, "num_workers": 0, "scaling": "unit"}
    return HuggingFaceDataModule(path, cache_dir=f"{path}-cache", **{**small, **arguments})


def saved(folder, images, labels, feature, image_feature=None):
    """A folder that `save_to_disk` has written, with one split for training."""
    features = Features({"picture": image_feature or EncodedImage(), "kind": feature})
    table = Dataset.from_dict({"picture": images, "kind": labels}, features=features)
    DatasetDict(train=table, validation=table).save_to_disk(folder)
    return module(folder, image_column="picture", label_column="kind", batch_size=1)


def test_digits_in_parquet_files_are_those_of_the_digits_datamodule(digits):
    data, reference = module(digits), DigitsDataModule(augment=False)
    assert data.find_class_names() == reference.class_names
    assert not data.class_names
    for each in (data, reference):
        each.setup("fit")
    assert data.class_names == reference.class_names
    for found, expected in zip(data.val_dataloader(), reference.val_dataloader(), strict=True):
        assert all(map(torch.equal, found, expected))
    train = data.train_dataloader().dataset
    images, labels = reference.read(train=True)
    assert torch.equal(torch.stack([train[number][0] for number in range(100)]), images[:100])
    assert torch.equal(train.labels, labels)
    # the order of training is the same too
    order = [torch.cat([labels for _, labels in each.train_dataloader()]) for each in (data, reference)]
    assert torch.equal(*order)
    assert train[SeededIndex(0, 0, 3, 0)][0].shape == (3, 32, 32)


def test_a_held_out_part_keeps_images_and_labels_together(digits):
    data = module(digits, val_split=0.1)
    data.setup("fit")
    images, labels = DigitsDataModule().read(train=True)
    held_out = pickle.loads(pickle.dumps(data.val_dataloader().dataset))  # as a process that reads gets it
    assert len(held_out) == 144
    for number in (0, 100):
        row = int(held_out.path_of(number).removeprefix(f"{digits}/train/"))
        assert torch.equal(held_out[number][0], images[row])
        assert held_out[number][1] == labels[row]


@pytest.mark.parametrize(
    ("splits", "tested"),
    [(("train", "validation"), "validation"), (("train", "test"), "test"), (("train", "more"), "held out of train")],
)
def test_with_images_held_out_the_test_is_on_the_split_that_is_there(digits, tmp_path, splits, tested):
    tmp_path.joinpath("d").mkdir()
    for name, file in zip(splits, sorted(digits.iterdir()), strict=True):
        shutil.copy(file, tmp_path / "d" / f"{name}-00000-of-00001.parquet")
    data = module(tmp_path / "d", val_split=0.1)
    data.setup("test")
    assert data.sampling.test == tested
    assert len(data.test_dataloader().dataset) == (144 if tested.startswith("held") else 360)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val_name": "test"}, r"Unknown split .*train.*validation.* val_name and test_name say what is read"),
        ({"image_column": "img"}, r"^image_column must be one of the columns of .*: image, label, got 'img'"),
        ({"label_column": "fine"}, r"^label_column must be one of the columns"),
        ({"image_column": "label"}, r"^image_column must be a column of images"),
    ],
)
def test_what_is_not_there_is_named(digits, arguments, message):
    with pytest.raises(ValueError, match=message):
        module(digits, **arguments).setup("fit")


def test_no_folder_is_an_error(tmp_path):
    data = module(tmp_path / "none")
    assert data.find_class_names() == ()
    with pytest.raises(FileNotFoundError, match=rf"There is no folder {tmp_path}/none, and the Hub"):
        data.setup("fit")


def test_the_package_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs datasets: pip install 'knlightning\[huggingface\]'"):
        module("digits")


@pytest.mark.parametrize(
    ("feature", "labels", "names", "numbers"),
    [
        (ClassLabel(names=["dog", "cat"]), [1, 0, 1], ("dog", "cat"), [1, 0, 1]),
        (Value("string"), ["dog", "cat", "dog"], ("cat", "dog"), [1, 0, 1]),
        (Value("int32"), [1, 0, 1], ("0", "1"), [1, 0, 1]),
        (ClassLabel(names=["dog", "cat"]), [0, -1, -1], None, r"kind: -1 is none of the 2 classes\. A split without"),
        (Value("int32"), [1, 3, 3], None, r"Labels must be of the feature ClassLabel, .*, got 1, 3"),
        (Value("string"), ["dog", None, "dog"], None, r"Labels must be .* got dog, None"),
    ],
)
def test_classes_are_stated_or_follow_from_the_training_images(tmp_path, feature, labels, names, numbers):
    data = saved(tmp_path / "saved", [{"bytes": ORANGE, "path": None}] * 3, labels, feature)
    if names is None:
        with pytest.raises(ValueError, match=numbers):
            data.setup("fit")
        return
    assert data.find_class_names() == (names if isinstance(feature, ClassLabel) else ())
    data.setup("validate")
    assert data.class_names == names
    assert data.val_dataloader().dataset.labels.tolist() == numbers


def test_the_rules_of_files_hold_for_rows(tmp_path, monkeypatch):
    turned = Image.new("RGB", (40, 30), "white")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.paste("black", (0, 0, 20, 30))  # the left half: the upper one, once it is turned
    (tmp_path / "file.png").write_bytes(ORANGE)
    images = [
        {"bytes": encoded(turned, "JPEG", exif=exif, quality=100), "path": None},
        {"bytes": None, "path": str(tmp_path / "file.png")},
        {"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n", "path": "a.png"},
        {"bytes": encoded(Image.new("L", (99, 99))), "path": None},
        None,
    ]
    data = saved(tmp_path / "saved", images, [0] * 5, ClassLabel(names=["a"]))
    data.setup("fit")
    dataset = data.train_dataloader().dataset
    assert dataset[0][0][0, 4, 16] < 50 < 200 < dataset[0][0][0, 28, 16]
    assert dataset[1][0][:, 16, 16].tolist() == [255, 165, 0]
    monkeypatch.setattr("knlightning.data.decoding.MAX_PIXELS", 99 * 98)
    for row, reason in ((2, "none of the formats JPEG"), (3, "99x99 pixels; at most"), (4, "the row has no image")):
        with pytest.raises(ValueError, match=rf"saved/train/{row}: cannot be read as an image \(.*{reason}"):
            dataset[row]
    nothing = copy.copy(dataset.images)
    nothing.table = [{"picture": {"bytes": None, "path": None}}]  # only in files of others: datasets does not write it
    with pytest.raises(ValueError, match="the row has no image"):
        nothing.find(0)
    dataset.skip_damaged = True
    assert dataset[2] is None
    assert dataset[SeededIndex(0, 0, 2, 0)][0].shape == (3, 32, 32)  # that of row 0, after the end
    with pytest.warns(UserWarning, match=r"3 of the 5 images .*: .*train/2, .*train/3, .*train/4\.$"):
        dataset.report()


def test_a_column_of_bytes_is_one_of_images(tmp_path):
    data = saved(tmp_path / "saved", [ORANGE], [0], ClassLabel(names=["a"]), Value("binary"))
    data.setup("validate")
    assert data.val_dataloader().dataset[0][0][:, 16, 16].tolist() == [255, 165, 0]
