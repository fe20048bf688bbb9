import json
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as EncodedImage
from PIL import Image
from standins import encoded

from knlightning.data import DigitScenesDataModule, HuggingFaceSegmentationDataModule
from knlightning.data.samplers import SeededIndex

NUMBERS = np.array([[7, 7, 9], [0, 255, 7]], np.uint8)


pytestmark = pytest.mark.usefixtures("no_network")


def png(pixels):
    return {"bytes": encoded(Image.fromarray(pixels)), "path": None}


def write(folder, images, masks, names=None):
    """Parquet files with a column of images and one of masks, the same for training and validation."""
    folder.mkdir(exist_ok=True)
    columns = {"photo": [png(image) for image in images], "annotation": masks}
    table = Dataset.from_dict(columns, Features(dict.fromkeys(columns, EncodedImage())))
    for split in ("train", "validation"):
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    if names is not None:
        (folder / "id2label.json").write_text(json.dumps(names))


def small(folder, masks=None, names=None, **arguments):
    """Images of 3x2 pixels, whose red is the number of their row."""
    masks = [png(NUMBERS)] * 4 if masks is None else masks
    write(folder, [np.full((2, 3, 3), row, np.uint8) for row in range(len(masks))], masks, names)
    return module(folder, **{"crop_size": (2, 3), "batch_size": 1, "ignored_numbers": (0, 255), **arguments})


def module(folder, **arguments):
    columns = {"image_column": "photo", "mask_column": "annotation"}
    return HuggingFaceSegmentationDataModule(
        folder, **{"cache_dir": f"{folder}-cache", "num_workers": 0, **columns, **arguments}
    )


def test_scenes_in_parquet_files_are_those_of_their_datamodule(tmp_path):
    scenes = DigitScenesDataModule((48, 64), 4, 4, augment=False, scaling="standard", eval_batch_size=1)
    scenes.mean, scenes.std = HuggingFaceSegmentationDataModule.mean, HuggingFaceSegmentationDataModule.std
    scenes.setup("validate")
    batches = list(scenes.val_dataloader())
    images = [batch[0][0].permute(1, 2, 0).numpy() for batch in batches]
    write(tmp_path / "data", images, [png(batch[1][0].numpy()) for batch in batches])
    data = module(
        tmp_path / "data", class_names=scenes.class_names, crop_size=(48, 64), scale_range=(1.0, 1.0), batch_size=4
    )
    assert data.find_class_names() == scenes.class_names
    data.setup("fit")
    assert (data.class_names, data.label_ids) == (scenes.class_names, scenes.label_ids)
    for found, expected in zip(data.val_dataloader(), batches, strict=True):
        assert all(map(torch.equal, found, expected))
    train = data.train_dataloader().dataset
    for row in range(4):
        varied, whole = (
            torch.cat([image, labels[None]]) for image, labels in (train[SeededIndex(0, 0, row, 0)], train[row])
        )
        assert torch.equal(varied, whole) or torch.equal(varied, whole.flip(-1))


def test_names_come_from_the_file_of_the_dataset_and_go_with_their_numbers(tmp_path):
    data = small(tmp_path / "data", names={"9": "sky", "0": "nothing", "7": "road"})
    assert data.find_class_names() == ("road", "sky")
    data.setup("fit")
    assert (data.class_names, data.label_ids) == (("road", "sky"), (7, 9))
    _, labels = data.val_dataloader().dataset[0]
    assert labels.tolist() == [[0, 0, 1], [255, 255, 0]]
    data = module(tmp_path / "data", ignored_numbers=(0, 255), predict_dir=tmp_path)
    Image.new("RGB", (5, 4)).save(tmp_path / "a.png")
    data.setup("predict")
    assert data.label_ids == (7, 9)
    assert next(iter(data.predict_dataloader()))[0].shape == (1, 3, 4, 5)


def test_a_part_keeps_images_and_masks_together(tmp_path):
    masks = [png(np.full((2, 3), row, np.uint8)) for row in range(4)]
    data = small(tmp_path / "data", masks, class_names=list("abcd"), ignored_numbers=(), val_split=0.5)
    data.setup("fit")
    held_out = pickle.loads(pickle.dumps(data.val_dataloader().dataset))  # as a process that reads gets it
    rows = [int(held_out.path_of(place).removeprefix(f"{tmp_path}/data/train/")) for place in range(2)]
    for place, row in enumerate(rows):
        image, labels = held_out[place]
        assert (image.unique().tolist(), labels.unique().tolist()) == ([row], [row])


@pytest.mark.parametrize(
    ("masks", "arguments", "message"),
    [
        (None, {"class_names": None}, r"^class_names must be names of the numbers in masks, since .* has no id2label"),
        (None, {"class_names": ["a"]}, r"^class_names must be names of numbers in masks from 0 to 255, got \{\}"),
        (None, {"ignored_numbers": [256]}, r"^ignored_numbers must be whole numbers from 0 to 255, got \[256\]"),
        (
            None,
            {"mask_column": "mask"},
            r"^mask_column must be one of the columns of .*: photo, annotation, got ",
        ),
        (None, {}, r"data/train/annotation/0: 4 pixels have numbers without a label: 7, 9\. .* are 0 to 1, 255"),
        ([png(np.zeros((3, 2), np.uint8))], {}, r"annotation/0: has 2x3 pixels, and its image .*/data/train/0 3x2"),
        ([png(np.zeros((2, 3, 3), np.uint8))], {}, r"annotation/0: must have one channel of 8 bits, .* is RGB"),
        ([png(NUMBERS), None], {"class_names": list("abcdefghij")}, r"annotation/1: .*the row has no image"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, masks, arguments, message):
    with pytest.raises(ValueError, match=message):
        small(tmp_path / "data", masks, **{"class_names": ["a", "b"], **arguments}).setup("fit")
