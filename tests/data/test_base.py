import inspect
import json
import os
import pickle
import re
from types import SimpleNamespace

import pytest
import standins
import torch
from jsonargparse import ArgumentError as ParserError
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from PIL import Image

import knlightning.data
from knlightning.data import BaseDataModule, DigitsDataModule, EvalSampler, ImageDataModule, TrainSampler


class ShapesDataModule(ImageDataModule):
    """A dataset of one's own, as the docstring of the base shows it: images 6 pixels high and 8 wide."""

    class_names = ("circle", "square", "star")
    mean = (0.2, 0.5, 0.8)
    std = (0.1, 0.2, 0.3)
    image_size = (6, 8)

    def read(self, train):
        self.reads = [*getattr(self, "reads", []), train]
        generator = torch.Generator().manual_seed(int(train))
        count = 60 if train else 21
        images = torch.randint(0, 256, (count, 3, 6, 8), generator=generator, dtype=torch.uint8)
        return images, torch.arange(count) % 3

    def augmentation(self, images):
        return images.flip(-1)  # always, so that a test sees it


class Probe(LightningModule):
    """Keeps what its steps are given."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6 * 8 * 3, 3)
        self.batches = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch, batch_idx):
        self.batches["train"].append(batch)
        return self.layer(batch[0].flatten(1)).square().mean()

    def validation_step(self, batch, batch_idx):
        self.batches["val"].append(batch)

    def test_step(self, batch, batch_idx):
        self.batches["test"].append(batch)

    def predict_step(self, batch, batch_idx):
        self.batches["predict"].append(batch)
        return self.layer(batch[0].flatten(1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**options):
    return standins.trainer(None, max_epochs=1, **{"enable_checkpointing": False, **options})


def pixels(images):
    """The uint8 images that `unit` scaled."""
    return (images * 255).round().to(torch.uint8)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("batch_size", 0),
        ("eval_batch_size", 0),
        ("scaling", "zscore"),
        ("val_split", 1.0),
        ("val_split", -0.1),
        ("val_split", float("nan")),
        ("split_seed", -1),
        ("split_seed", 0.5),
        ("num_workers", -1),
    ],
)
def test_arguments_out_of_range_are_named(argument, value):
    with pytest.raises(ValueError, match=rf"^{argument} must be .*, got {value!r}"):
        ShapesDataModule(**{argument: value})


LOADER_ARGUMENTS = {
    name: parameter.default
    for name, parameter in inspect.signature(BaseDataModule).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
}
MODULES = [
    getattr(knlightning.data, name)
    for name in knlightning.data.__all__
    if name.endswith("DataModule") and not inspect.isabstract(getattr(knlightning.data, name))
]


@pytest.mark.parametrize("module", MODULES)
def test_every_datamodule_takes_the_arguments_of_the_base(module):
    """They stand once, in the base: subclasses hand on the rest of their keyword arguments."""
    assert len(LOADER_ARGUMENTS) == 10
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    where = {name: "nowhere" for name in ("root", "path") if name in inspect.signature(module).parameters}
    given = [
        f"--data={module.__module__}.{module.__qualname__}",
        *(f"--data.{name}={value}" for name, value in where.items()),
        "--data.split_seed=5",
    ]
    parsed = parser.parse_args(given).data.init_args
    described = ArgumentParser()
    described.add_class_arguments(module, "data")
    text = described.format_help()
    for name in LOADER_ARGUMENTS:
        assert name in parsed
        assert re.search(rf"--data\.{name} \S+\s+[A-Z`]", text), f"{name} is not described"
    with pytest.raises(ParserError, match="batchsize"):
        parser.parse_args([*given, "--data.batchsize=3"])
    with pytest.raises(ParserError, match="split_seed"):
        parser.parse_args([*given, "--data.split_seed=many"])
    # what goes into checkpoints and TensorBoard is all of it, those not given too
    made = parser.instantiate(parser.parse_args(given)).data
    assert dict(made.hparams) == parsed.as_dict()
    assert made.split_seed == 5
    with pytest.raises(TypeError, match="batchsize"):
        module(**where, batchsize=3)


def test_works_without_a_trainer():
    data = ShapesDataModule(batch_size=8, eval_batch_size=10)
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert images.dtype == torch.uint8
    assert images.shape == (8, 3, 6, 8)
    assert labels.shape == (8,)
    assert [len(labels) for _, labels in data.val_dataloader()] == [10, 10, 1]
    scaled, same = data.on_after_batch_transfer((images, labels), 0)
    assert torch.equal(scaled, images / 255)  # no trainer: nothing is augmented
    assert same is labels


def test_a_whole_run_sees_the_right_images_scaled_and_augmented_while_training_only(tmp_path):
    Image.new("RGB", (20, 20), (255, 0, 0)).save(tmp_path / "red.png")
    data = ShapesDataModule(batch_size=32, predict_dir=tmp_path)
    model, run = Probe(), trainer(num_sanity_val_steps=1)
    run.fit(model, datamodule=data)
    run.test(model, datamodule=data, verbose=False)
    run.predict(model, datamodule=data)

    train_images, train_labels = data.read(True)
    seen = pixels(torch.cat([images for images, _ in model.batches["train"]])).flip(-1)  # undo the augmentation
    order = [int((train_images == image).flatten(1).all(1).nonzero()) for image in seen]
    assert sorted(order) == list(range(60))
    assert order != sorted(order)
    assert torch.equal(torch.cat([labels for _, labels in model.batches["train"]]), train_labels[order])

    test_images, test_labels = data.read(False)
    for part in (model.batches["val"][1:], model.batches["test"]):  # [0] was the sanity check
        assert torch.equal(torch.cat([images for images, _ in part]), test_images / 255)
        assert torch.equal(torch.cat([labels for _, labels in part]), test_labels)
    [(images, names)] = model.batches["predict"]
    assert names == [str(tmp_path / "red.png")]
    assert torch.equal(images, torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 6, 8))


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_images_come_in_the_trainers_precision(precision, dtype):
    model = Probe()
    trainer(precision=precision).fit(model, datamodule=ShapesDataModule(batch_size=60))
    assert model.batches["train"][0][0].dtype == dtype


def test_scaling_by_name_and_back():
    images, labels = ShapesDataModule().read(True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (ShapesDataModule.mean, ShapesDataModule.std))
    for scaling, expected in (("unit", images / 255), ("standard", (images / 255 - mean) / std)):
        data = ShapesDataModule(scaling=scaling)
        scaled, _ = data.on_after_batch_transfer((images, labels), 0)
        torch.testing.assert_close(scaled, expected)
        torch.testing.assert_close(data.displayable(scaled), images / 255)
        assert data.displayable(scaled[0]).shape == (3, 6, 8)
    assert ShapesDataModule().displayable(torch.tensor([-1.0, 2.0]).view(2, 1, 1, 1)).flatten().tolist() == [0, 1]


def test_only_what_a_stage_needs_is_read_and_only_once():
    for val_split, stages, expected in (
        (0.0, ["fit"], [True, False]),
        (0.25, ["fit"], [True]),
        (0.0, ["validate", "test"], [False]),
        (0.25, ["validate"], [True]),
        (0.25, ["test"], [False]),
        (0.25, ["fit", "validate", "test", "fit"], [True, False]),
    ):
        data = ShapesDataModule(val_split=val_split)
        for stage in stages:
            data.setup(stage)
        assert data.reads == expected, (val_split, stages)


def test_the_held_out_split_is_stratified_fixed_and_disjoint():
    def parts(split_seed):
        data = ShapesDataModule(val_split=0.25, split_seed=split_seed, batch_size=60)
        data.setup("fit")
        train, _ = next(iter(data.train_dataloader()))
        val, labels = next(iter(data.val_dataloader()))
        return train, val, labels

    train, val, labels = parts(0)
    assert len(train) == 45
    assert labels.bincount().tolist() == [5, 5, 5]
    everything = {tuple(image.flatten().tolist()) for image in ShapesDataModule().read(True)[0]}
    assert {tuple(image.flatten().tolist()) for image in torch.cat([train, val])} == everything
    seed_everything(5, verbose=False)  # the run's seed does not move the split
    try:
        assert torch.equal(parts(0)[1], val)
    finally:
        del os.environ["PL_GLOBAL_SEED"], os.environ["PL_SEED_WORKERS"]
    assert not torch.equal(parts(1)[1], val)


def test_the_order_follows_the_seed_of_the_run(monkeypatch):
    def order():
        data = ShapesDataModule()
        data.setup("fit")
        return list(data.train_dataloader().sampler)

    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    unseeded = order()
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    assert order() == unseeded
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert order() != unseeded


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_leave_the_global_random_numbers_alone(workers):
    data = ShapesDataModule()
    data._workers = lambda _: workers  # as if the images were read from files
    data.setup("fit")
    before = torch.get_rng_state()
    list(data.train_dataloader())
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_two_ranks_share_training_and_evaluation():
    train, evaluated = [], []
    for rank in range(2):
        data = ShapesDataModule(batch_size=4)
        data.trainer = SimpleNamespace(
            world_size=2,
            global_rank=rank,
            current_epoch=0,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
        )
        data.setup("fit")
        loader = data.train_dataloader()
        assert isinstance(loader.sampler, TrainSampler)
        train.append([image for images, _ in loader for image in images])
        assert isinstance(data.test_dataloader().sampler, EvalSampler)
        evaluated += [image for images, _ in data.test_dataloader() for image in images]
    assert len(train[0]) == len(train[1]) == 30
    images, test_images = data.read(True)[0], data.read(False)[0]
    assert {tuple(image.flatten().tolist()) for part in train for image in part} == {
        tuple(image.flatten().tolist()) for image in images
    }
    assert len(evaluated) == 21  # an odd number: nothing was counted twice to fill up
    assert {tuple(image.flatten().tolist()) for image in evaluated} == {
        tuple(image.flatten().tolist()) for image in test_images
    }


class RankRecorder(Probe):
    """Writes down which labels each rank was given, in files that outlive the processes."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_fit_end(self):
        seen = {
            part: [pixels(image).flatten().tolist() for images, _ in self.batches[part] for image in images]
            for part in ("train", "val")
        }
        (self.folder / f"{self.global_rank}.json").write_text(json.dumps(seen))


@pytest.mark.slow
def test_lightning_leaves_the_samplers_in_place_on_two_devices(tmp_path):
    run = trainer(strategy="ddp_spawn", devices=2, num_sanity_val_steps=0)  # use_distributed_sampler is on
    run.fit(RankRecorder(tmp_path), datamodule=ShapesDataModule(batch_size=8, augment=False))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for part, train in (("train", True), ("val", False)):
        images = sorted(image.flatten().tolist() for image in ShapesDataModule().read(train)[0])
        assert sorted(first[part] + second[part]) == images
    assert len(first["train"]) == len(second["train"]) == 30


def test_checkpoints_hold_plain_values_only(tmp_path):
    data = ShapesDataModule(batch_size=30, predict_dir=tmp_path)
    run = trainer(enable_checkpointing=True, default_root_dir=tmp_path)
    run.fit(Probe(), datamodule=data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["datamodule_hyper_parameters"]
    assert stored["batch_size"] == 30
    assert stored["predict_dir"] == str(tmp_path)
    again = ShapesDataModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert again.batch_size == 30


def test_can_be_pickled():
    data = ShapesDataModule(batch_size=7)
    data.setup("test")
    copy = pickle.loads(pickle.dumps(data))
    assert copy.batch_size == 7
    assert torch.equal(next(iter(copy.test_dataloader()))[0], next(iter(data.test_dataloader()))[0])


def test_names_of_the_classes_come_with_a_checkpoint_where_no_data_are_read():
    stored = ShapesDataModule().state_dict()
    assert stored["class_names"] == ["circle", "square", "star"]
    other = stored | {"class_names": ["circle", "star", "square", "heart"]}
    data = ShapesDataModule()
    data.load_state_dict(other)
    assert data.class_names == ("circle", "star", "square", "heart")
    data = ShapesDataModule()
    data.setup("test")
    data.load_state_dict(stored)  # no warning
    data.load_state_dict({"seed": 3})
    with pytest.warns(UserWarning, match=r"'star' \('square'\), 'square' \('star'\), 'heart' \(None\)"):
        data.load_state_dict(other)
    assert data.class_names == ShapesDataModule.class_names


def test_number_of_classes_is_known_before_anything_is_read():
    data = ShapesDataModule()
    assert data.num_classes == 3
    with pytest.raises(RuntimeError, match="setup"):
        data.train_dataloader()
    with pytest.raises(RuntimeError, match=r"setup\('predict'\)"):
        data.predict_dataloader()


def test_pinning_follows_the_device_unless_told():
    data = ShapesDataModule()
    data.setup("fit")
    assert not data.train_dataloader().pin_memory
    for device in ("cuda", "cpu", "mps"):
        strategy = SimpleNamespace(root_device=torch.device(device))
        data.trainer = SimpleNamespace(world_size=1, global_rank=0, current_epoch=0, strategy=strategy)
        assert data.train_dataloader().pin_memory == data.val_dataloader().pin_memory == (device == "cuda")
    for told in (True, False):
        data.pin_memory = told
        assert data.train_dataloader().pin_memory == data.val_dataloader().pin_memory == told


def test_predict_without_a_folder_says_how_to_give_one():
    with pytest.raises(ValueError, match=r"^predict_dir must be the folder of the images to predict on, got None$"):
        DigitsDataModule().setup("predict")
