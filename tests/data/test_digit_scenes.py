import os
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import seed_everything

from knlightning.data import DigitScenesDataModule, digit_scenes


def ready(stage="fit", **arguments):
    small = {"image_size": (32, 32), "train_scenes": 40, "eval_scenes": 20, "batch_size": 16}
    data = DigitScenesDataModule(**small | arguments)
    data.setup(stage)
    return data


def everything(loader):
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    return images, labels


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("image_size", (64, 31)),
        ("image_size", (31, 64)),
        ("train_scenes", 0),
        ("eval_scenes", 0),
        ("eval_scenes", 10**30),
        ("batch_size", 0),
    ],
)
def test_arguments_out_of_range_are_named(argument, value):
    with pytest.raises(ValueError, match=rf"^{argument} must be .*, got "):
        DigitScenesDataModule(**{argument: value})


def test_scenes_have_the_promised_form_by_default():
    data = DigitScenesDataModule()
    data.setup("fit")
    assert data.num_classes == len(data.class_names) == len({*data.palette}) == 11
    assert data.label_ids == tuple(range(11))
    assert (data.image_size, data.ignore_index) == ((64, 64), 255)
    for loader, count in ((data.train_dataloader(), 1000), (data.val_dataloader(), 200)):
        images, labels = everything(loader)
        assert (images.shape, images.dtype) == ((count, 3, 64, 64), torch.uint8)
        assert (labels.shape, labels.dtype) == ((count, 64, 64), torch.uint8)
        share = labels.flatten().long().bincount(minlength=256) / labels.numel()
        assert share[11:255].sum() == 0
        assert 0.7 < share[0] < 0.85
        assert 0.05 < share[255] < 0.1
        assert share[1:11].min() > 0.01
        assert (labels.flatten(1) > 0).any(1).all()  # no scene is empty
    pixels = everything(data.train_dataloader())[0].double() / 255
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.tensor(data.mean).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3)), torch.tensor(data.std).double(), atol=1e-3, rtol=0)


def test_the_canvas_has_its_height_first():
    data = ready(image_size=(40, 72))
    images, labels = everything(data.train_dataloader())
    assert images.shape == (40, 3, 40, 72)
    assert labels.shape == (40, 40, 72)
    assert data.image_size == (40, 72)
    digits = (labels > 0).float().mean(0)
    assert digits[:, -12:].sum() > 0  # digits lie all over it
    assert digits[-10:].sum() > 0


def test_parts_share_no_digit(monkeypatch):
    def record(ink, labels, num_scenes, size, seed):
        used[seed] = {one.numpy().tobytes() for one in ink}
        return ink, labels

    def parts(**arguments):
        """The digits of the scenes of each part."""
        used.clear()
        data = DigitScenesDataModule(**arguments)
        for stage in ("fit", "test"):
            data.setup(stage)
        return list(used.values())

    used = {}
    monkeypatch.setattr(digit_scenes, "compose_scenes", record)
    train, test = parts()
    assert (len(train), len(test)) == (1437, 360)
    assert not train & test
    kept, held_out, still = parts(val_split=0.1)
    assert still == test
    assert (len(kept), len(held_out)) == (1293, 144)
    assert kept | held_out == train
    assert parts(val_split=0.1, split_seed=1)[1] != held_out


def test_held_out_digits_make_the_validation_scenes():
    split, whole = ready(val_split=0.2), ready()
    assert len(split.val_dataloader().dataset) == 20
    assert not torch.equal(everything(split.val_dataloader())[0], everything(whole.val_dataloader())[0])
    whole.setup("test")
    assert torch.equal(everything(whole.val_dataloader())[0], everything(whole.test_dataloader())[0])
    alone = ready("validate", val_split=0.2)
    assert torch.equal(everything(alone.val_dataloader())[0], everything(split.val_dataloader())[0])


def test_scenes_are_always_the_same_and_more_begin_with_the_fewer():
    few = ready().train_dataloader().dataset
    seed_everything(7, verbose=False)
    try:
        more = ready(train_scenes=100).train_dataloader().dataset
    finally:
        del os.environ["PL_GLOBAL_SEED"], os.environ["PL_SEED_WORKERS"]
    assert torch.equal(more.images[:40], few.images)
    assert torch.equal(more.labels[:40], few.labels)
    assert len({image.numpy().tobytes() for image in more.images}) == 100
    before = torch.get_rng_state()
    ready()
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_shifts_images_and_labels_alike():
    torch.manual_seed(0)
    images = torch.randint(1, 256, (1, 3, 12, 16), dtype=torch.uint8)
    labels = torch.randint(0, 11, (1, 12, 16), dtype=torch.uint8)
    labels[0, 0, 0] = 255
    wide = torch.nn.functional.pad(images, [4] * 4)
    around = torch.nn.functional.pad(labels, [4] * 4, value=255)
    expected = {
        (wide[0, :, y : y + 12, x : x + 16].numpy().tobytes(), around[0, y : y + 12, x : x + 16].numpy().tobytes())
        for y in range(9)
        for x in range(9)
    }
    varied = DigitScenesDataModule().augmentation(images.expand(2000, -1, -1, -1), labels.expand(2000, -1, -1))
    assert varied[0].dtype == varied[1].dtype == torch.uint8
    assert {(a.numpy().tobytes(), b.numpy().tobytes()) for a, b in zip(*varied, strict=True)} == expected


@pytest.mark.parametrize("augment", [True, False])
def test_scenes_are_varied_in_training_only(augment):
    data = ready(augment=augment)
    precision = SimpleNamespace(convert_input=lambda images: images)
    batch = next(iter(data.val_dataloader()))
    for training in (True, False):
        data.trainer = SimpleNamespace(training=training, precision_plugin=precision)
        images, labels = data.on_after_batch_transfer(batch, 0)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert torch.equal(labels, batch[1].long()) != (training and augment)
        assert torch.equal((images * 255).round(), batch[0].float()) != (training and augment)
        torch.testing.assert_close(data.displayable(images), images)
