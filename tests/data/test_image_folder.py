import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import standins
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from standins import write_image_folder
from torchvision.transforms import v2

from knlightning.data import ImageFolderDataModule
from knlightning.data.decoding import pixels
from knlightning.data.labelled_files import RandomCropAndFlip
from knlightning.data.samplers import SeededIndex

BROKEN = b"\xff\xd8\xff broken"


@pytest.fixture
def root(tmp_path):
    """Ten training images, and as many to validate on, in each of two classes."""
    write_image_folder(tmp_path / "data", count=10)
    return tmp_path / "data"


def module(root, **arguments):
    small = {"train_size": 16, "eval_resize": 20, "eval_size": 16, "batch_size": 4, "num_workers": 0}
    return ImageFolderDataModule(root, **{**small, **arguments})


def fitted(root, **arguments):
    data = module(root, **arguments)
    data.setup("fit")
    return data


def batches(loader):
    return list(loader)


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("train_size", 0, "a whole number at least 1"),
        ("eval_size", 0, "a whole number at least 1"),
        ("eval_resize", 15, "a whole number at least 16"),
        ("random_erasing", 1.5, "a number at least 0 and at most 1"),
        ("random_erasing", float("nan"), "a number at least 0 and at most 1"),
        ("repeated_augmentation", 0, "a whole number at least 1"),
        ("num_workers", -1, "a whole number at least 0, or null for the number of processors"),
        ("batch_size", 0, "a whole number at least 1"),
    ],
)
def test_arguments_out_of_range_are_named(tmp_path, argument, value, allowed):
    with pytest.raises(ValueError, match=rf"^{argument} must be {allowed}, got {value!r}"):
        module(tmp_path, **{argument: value})


def test_classes_are_the_sorted_folders_and_files_the_sorted_images(root):
    shutil.copytree(root / "train" / "cat", root / "train" / "ant" / "deeper")
    (root / "train" / ".cache").mkdir()
    (root / "train" / "ant" / "notes.txt").write_text("no image")
    (root / "train" / "ant" / ".hidden.png").write_bytes(b"")
    data = fitted(root)
    assert data.class_names == ("ant", "cat", "dog")
    assert data.num_classes == 3
    dataset = data.train_dataloader().dataset
    expected = [f"ant/deeper/{n}.png" for n in range(10)] + [f"{c}/{n}.png" for c in ("cat", "dog") for n in range(10)]
    assert [Path(dataset.path_of(n)).relative_to(root / "train").as_posix() for n in range(30)] == expected
    assert dataset.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    # the validation images have no ant: labels still are those of the training images
    assert torch.cat([labels for _, labels in data.val_dataloader()]).unique().tolist() == [1, 2]


def test_evaluation_is_torchvisions_resize_and_centre_crop(root):
    reference = v2.Compose([v2.Resize(20), v2.CenterCrop(16), v2.PILToTensor()])
    data = fitted(root)
    images, labels = next(iter(data.val_dataloader()))
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0] * 4
    for number, image in enumerate(images):
        assert torch.equal(image, reference(Image.open(root / "val" / "cat" / f"{number}.png")))
    scaled, _ = data.on_after_batch_transfer((images, labels), 0)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(scaled, (images / 255 - mean) / std)


def test_predictions_see_images_as_evaluation_does(root):
    data = fitted(root, predict_dir=root / "val" / "cat")
    data.setup("predict")
    images, paths = next(iter(data.predict_dataloader()))
    assert paths == [str(root / "val" / "cat" / f"{n}.png") for n in range(4)]
    assert torch.equal(images, next(iter(data.val_dataloader()))[0])


@pytest.mark.parametrize("options", [{}, {"trivial_augment": True, "random_erasing": 1.0}])  # erased later
def test_training_images_are_varied_with_the_seed_of_the_index(root, options):
    trivial = v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)
    more = [v2.ToPILImage(), trivial, v2.PILToTensor()] if options else []
    reference = v2.Compose([v2.PILToTensor(), RandomCropAndFlip(16), *more])
    dataset = fitted(root, **options).train_dataloader().dataset
    for index in (SeededIndex(3, 7, 12, 1), SeededIndex(0, 0, 0, 0)):
        before = torch.get_rng_state()
        image, label = dataset[index]
        assert torch.equal(torch.get_rng_state(), before)
        assert label == index.image // 10
        with torch.random.fork_rng():
            torch.manual_seed(int(np.random.SeedSequence([*index]).generate_state(1, np.uint64)[0]))
            expected = reference(Image.open(dataset.path_of(index.image)))
        assert torch.equal(image, expected)


def test_an_erased_rectangle_is_zero_after_scaling(root):
    data = fitted(root, random_erasing=1.0, batch_size=20)
    images, _ = next(iter(data.train_dataloader()))
    scaled = data.prepared(images, train=True)
    blank = (scaled.abs() < 0.01).all(dim=1)
    assert (blank.sum((1, 2)) >= 4).all()  # 2 % of 256 pixels at the least
    assert (data.prepared(images, train=False).abs() < 0.01).all(dim=1).sum() <= 5
    data = fitted(root, random_erasing=1.0, augment=False)
    assert torch.equal(data.prepared(images, train=True), data.prepared(images, train=False))


@pytest.mark.parametrize("workers", [1, 2])
def test_images_do_not_depend_on_the_number_of_workers(root, workers):
    alone, many = (fitted(root, num_workers=n, trivial_augment=True).train_dataloader() for n in (0, workers))
    epochs = []
    for epoch in range(2):
        for loader in (alone, many):
            loader.sampler.set_epoch(epoch)
        epochs.append(batches(alone))
        assert same(epochs[-1], batches(many))
    assert not same(*epochs)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumed_within_an_epoch_sees_the_same_images(root, workers):
    first = fitted(root, num_workers=workers, repeated_augmentation=2).train_dataloader()
    first.sampler.set_epoch(4)
    whole = batches(first)
    iterator = iter(first)
    for _ in range(2):
        next(iterator)
    second = fitted(root, repeated_augmentation=2).train_dataloader()
    second.load_state_dict(first.state_dict())
    assert same(batches(second), whole[2:])


def test_repeated_images_are_varied_differently(root):
    loader = fitted(root, repeated_augmentation=4, batch_size=20).train_dataloader()
    shown = Counter(index.image for index in loader.sampler)
    assert set(shown.values()) == {4}
    assert len(shown) == 5
    [(images, labels)] = batches(loader)
    assert len(images) == 20  # the epoch is as long as without
    assert len({image.numpy().tobytes() for image in images}) == 20
    assert all(labels[n : n + 4].unique().numel() == 1 for n in range(0, 20, 4))


def damage(root, *files):
    for file in files:
        (root / file).write_bytes(BROKEN)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_an_error_that_names_it(root, workers):
    damage(root, "train/dog/3.png", "val/cat/0.png")
    data = fitted(root, num_workers=workers)
    for loader, name in ((data.train_dataloader(), r"train/dog/3\.png"), (data.val_dataloader(), r"val/cat/0\.png")):
        with pytest.raises(ValueError, match=f"{name}: cannot be read as an image"):
            batches(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_skipped_if_so_chosen_and_counted(root, workers):
    damage(root, "train/cat/9.png", "train/dog/3.png", "train/dog/4.png", *(f"val/cat/{n}.png" for n in range(5)))
    data = fitted(root, num_workers=workers, skip_damaged=True)
    loader = data.train_dataloader()
    with pytest.warns(UserWarning, match=r"3 of the 20 images could not be read so far") as caught:
        training = batches(loader)
    assert all(str(root / "train" / name) in str(caught[0].message) for name in ("cat/9.png", "dog/3.png", "dog/4.png"))
    assert [len(labels) for _, labels in training] == [4] * 5
    # the next files took their places: 10 for 9, with the label of 10, and 15 for 13 and 14
    order = [index.image for index in loader.sampler]
    images, labels = (dict(zip(order, torch.cat(part), strict=True)) for part in zip(*training, strict=True))
    assert {number: int(label) for number, label in labels.items()} == {
        number: int(number >= 9) for number in range(20)
    }
    with torch.random.fork_rng():
        torch.manual_seed(int(np.random.SeedSequence([0, 0, 13, 0]).generate_state(1, np.uint64)[0]))
        assert torch.equal(images[13], data.augmentation(pixels(root / "train/dog/5.png")))

    with pytest.warns(UserWarning, match=r"5 of the 20 .*val/cat/0\.png.*val/cat/4\.png\.$"):
        evaluated = batches(data.val_dataloader())
    assert [labels.tolist() for _, labels in evaluated] == [[0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [1] * 4]
    # each is reported once
    assert same(batches(loader), training)


def test_the_count_of_damaged_images_is_given_when_an_epoch_is_cut_short(root):
    damage(root, *(f"train/{name}/{n}.png" for name in ("cat", "dog") for n in range(0, 10, 2)))
    loader = fitted(root, skip_damaged=True, batch_size=10).train_dataloader()
    iterator = iter(loader)
    next(iterator)
    with pytest.warns(UserWarning, match=r"\d of the 20 images could not be read so far.* and \d more"):
        iterator.close()  # a generator


def test_unusable_folders_are_named(root):
    def error(kind, stage="fit", **arguments):
        with pytest.raises(kind) as caught:
            module(root, **arguments).setup(stage)
        return str(caught.value)

    assert "There is no folder" in error(FileNotFoundError, train_folder="nowhere")
    with pytest.raises(FileNotFoundError, match=rf"There is no folder {root / 'none'}\. "):
        module(root / "none").setup("fit")
    assert str(root / "nowhere") in error(FileNotFoundError, train_folder="nowhere")
    assert f"no folders in {root / 'train' / 'cat'}" in error(ValueError, train_folder="train/cat")
    for part, stage in (("train", "fit"), ("val", "test")):
        (root / part / "cow").mkdir()
        (root / part / "cow" / "notes.txt").write_text("")
        if part == "val":
            message = error(ValueError, stage)
            assert f"{root / 'val'}: folders of classes that {root / 'train'} does not have: cow." in message
            shutil.copytree(root / "train" / "cat", root / "train" / "cow")
        assert f"{root / part}: no images in the folders cow." in error(ValueError, stage)
        shutil.rmtree(root / part / "cow")


def test_parts_by_name_and_by_split(root):
    (root / "val").rename(root / "other")
    shutil.copytree(root / "other", root / "extra")
    (root / "extra" / "cat" / "0.png").unlink()
    data = module(root, val_folder="other", test_folder="extra")
    data.setup("fit")
    data.setup("test")
    sizes = [len(loader.dataset) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
    assert sizes == [20, 20, 19]
    assert len(fitted(root, val_folder="other").val_dataloader().dataset) == 20
    data = module(root, val_folder="other")
    data.setup("test")
    assert len(data.test_dataloader().dataset) == 20  # no folder of their own: the validation images

    held = fitted(root, val_folder="nowhere", val_split=0.2)
    train, val = held.train_dataloader().dataset, held.val_dataloader().dataset
    assert {train.path_of(n) for n in range(16)} | {val.path_of(n) for n in range(4)} == {
        str(root / "train" / name / f"{n}.png") for name in ("cat", "dog") for n in range(10)
    }
    assert val.labels.tolist() == [0, 0, 1, 1]
    reference = v2.Compose([v2.Resize(20), v2.CenterCrop(16), v2.PILToTensor()])
    assert torch.equal(next(iter(held.val_dataloader()))[0][1], reference(Image.open(val.path_of(1))))
    assert val.damaged.shape == (4,)


def test_validation_images_alone_suffice_for_testing(root):
    shutil.rmtree(root / "train")
    data = module(root)
    data.setup("test")
    assert data.class_names == ("cat", "dog")
    assert len(batches(data.test_dataloader())) == 5


def test_photographs_are_turned_upright_where_the_class_says_so(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        image = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
        image.save(tmp_path / part / "a" / "0.png", exif=exif)

    class AsTheyLie(ImageFolderDataModule):
        upright = False

    as_they_lie = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for kind, expected in ((ImageFolderDataModule, as_they_lie.rot90(-1, (1, 2))), (AsTheyLie, as_they_lie)):
        data = kind(tmp_path, eval_resize=16, eval_size=16, num_workers=0)
        data.setup("validate")
        assert torch.equal(next(iter(data.val_dataloader()))[0][0], expected)


class Mean(LightningModule):
    """A model of one weight that keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen = {"train": [], "val": [], "predict": []}

    def training_step(self, batch, batch_idx):
        assert batch[0].dtype == torch.float32
        self.seen["train"].append((*batch[0].shape,))
        return (self.weight * batch[0].mean() - batch[1].float().mean()).square()

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append((*batch[0].shape,))

    def predict_step(self, batch, batch_idx):
        self.seen["predict"].append((*batch[0].shape,))
        return batch[0].mean((1, 2, 3))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_whole_run_and_predictions_elsewhere(root, tmp_path):
    def trainer():
        return standins.trainer(tmp_path, max_epochs=1)

    damage(root, "val/cat/2.png")
    model, run = Mean(), trainer()
    with pytest.warns(UserWarning, match="1 of the 20"):
        run.fit(model, datamodule=module(root, skip_damaged=True))
    assert model.seen["train"] == [(4, 3, 16, 16)] * 5
    assert model.seen["val"][2:] == [(3, 3, 16, 16)] + [(4, 3, 16, 16)] * 4  # after the sanity check
    run.save_checkpoint(tmp_path / "last.ckpt")
    # where the data it was trained on are not: the names of the classes come with the checkpoint
    data = module(tmp_path / "nowhere", predict_dir=root / "train")
    assert data.class_names == ()
    trainer().predict(model, datamodule=data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert data.class_names == ("cat", "dog")
    assert model.seen["predict"] == [(4, 3, 16, 16)] * 5
    (root / "train" / "dog").rename(root / "train" / "bird")
    (root / "val" / "dog").rename(root / "val" / "bird")
    (root / "val" / "cat" / "2.png").unlink()
    data = module(root)
    with pytest.warns(UserWarning, match=r"in the checkpoint \(in the data\): 'cat' \('bird'\), 'dog' \('cat'\)\."):
        trainer().validate(model, datamodule=data, ckpt_path=tmp_path / "last.ckpt", verbose=False)


# what overfit_batches is for
@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
def test_overfitting_on_a_few_batches_takes_images_as_evaluation_does(root):
    model = Mean()
    standins.trainer(None, max_epochs=2, overfit_batches=2).fit(model, datamodule=module(root, eval_size=12))
    assert model.seen["train"] == [(4, 3, 12, 12)] * 4


@pytest.mark.parametrize(("processors", "devices", "expected"), [(12, 1, 12), (12, 4, 3), (2, 8, 1), (256, 2, 16)])
def test_the_default_number_of_workers_is_shared_between_devices(root, monkeypatch, processors, devices, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(processors)), raising=False)
    data = fitted(root, num_workers=None)
    data.trainer = SimpleNamespace(
        world_size=devices,
        global_rank=0,
        num_devices=devices,
        current_epoch=0,
        lightning_module=None,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert loader.num_workers == expected
        assert loader.persistent_workers


def scores_on(root, **arguments):
    data = module(root, **arguments)
    data.setup("test")
    return Path(data.test_dataloader().dataset.images.folder).name


def test_what_is_called_test_is_tested_on(root, caplog):
    with caplog.at_level("INFO"):
        assert scores_on(root) == "val"
    assert "Test images: the same as for validation ('val')" in caplog.text
    (root / "test").mkdir()
    (root / "test" / "1.png").write_bytes(b"")  # as in ImageNet, whose test images have no labels
    (root / "test" / ".cache").mkdir()
    assert scores_on(root) == "val"
    shutil.copytree(root / "val" / "cat", root / "test" / "cat")
    caplog.clear()
    with caplog.at_level("INFO"):
        assert scores_on(root) == "test"
    assert "the same as for validation" not in caplog.text
    assert scores_on(root, test_folder="val") == "val"


def test_images_held_out_are_not_those_that_are_tested_on(root, caplog):
    with caplog.at_level("INFO"):
        scores_on(root, val_split=0.2)
    assert "the same as for validation" not in caplog.text


def test_classes_may_lie_in_the_root_and_those_held_out_serve_for_testing(root):
    fit, test = (module(root / "train", val_split=0.2) for _ in range(2))
    fit.setup("fit")
    test.setup("test")
    assert test.class_names == ("cat", "dog")
    assert (len(fit.train_dataloader().dataset), len(test.test_dataloader().dataset)) == (16, 4)
    assert same(batches(fit.val_dataloader()), batches(test.test_dataloader()))
    with pytest.raises(FileNotFoundError, match=r"train/val\. .* With val_split above 0 there need be no folder val"):
        module(root / "train").setup("fit")


def test_a_decoder_may_be_put_in_place_of_ours(root, monkeypatch):
    monkeypatch.setattr(
        "knlightning.data.image_folder.decoded", lambda path, upright: Image.new("RGB", (30, 30), "red")
    )
    data = fitted(root)
    assert data.val_dataloader().dataset[0][0][:, 0, 0].tolist() == [255, 0, 0]
    assert data.train_dataloader().dataset[SeededIndex(0, 0, 0, 0)][0][:, 0, 0].tolist() == [255, 0, 0]


def test_damaged_images_to_predict_on_are_skipped(root, tmp_path):
    (tmp_path / "own").mkdir()
    shutil.copy(root / "val" / "cat" / "1.png", tmp_path / "own")
    (tmp_path / "own" / "2.png").write_bytes(BROKEN)
    data = module(root, predict_dir=tmp_path / "own")
    data.setup("predict")
    with pytest.warns(UserWarning, match="1 of the 2 images could not be read, and have no prediction"):
        ((images, paths),) = data.predict_dataloader()
    assert (len(images), paths) == (1, [str(tmp_path / "own" / "1.png")])


@pytest.mark.parametrize(("validated_on", "told"), [("test", True), ("val", False), (None, False)])
def test_a_checkpoint_chosen_on_what_are_test_images_now_is_told(root, caplog, validated_on, told):
    shutil.copytree(root / "val", root / "test")
    stored = module(root, val_folder=validated_on or "val").state_dict()
    assert stored["validated_on"] == (validated_on or "val")
    if validated_on is None:  # of an earlier release
        del stored["validated_on"]
    data = module(root)
    data.trainer = SimpleNamespace(testing=True)
    with caplog.at_level("INFO"):
        data.load_state_dict(stored)
    assert ("Test images: the same as for validation ('test')" in caplog.text) == told
