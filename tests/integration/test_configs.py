"""Every shipped configuration: what it is composed to, a step of its training, and all commands with few images."""

import re
import shutil

import pytest
import yaml
from PIL import Image
from standins import (
    PROJECT,
    write_cifar10,
    write_cifar100,
    write_cityscapes,
    write_image_folder,
    write_imagenet,
    write_imagenet32,
    write_parquet,
)

from knlightning.analysis.paper import BATCH_SIZE, DROPOUT, LEARNING_RATE, NORM, ROWS
from knlightning.commands.main import main, run

CONFIGS = sorted((PROJECT / "configs").glob("*.yaml"))
COSINE = {"class_path": "knlightning.tasks.CosineLR", "init_args": {"final": 0.01}}
STEPS = {"class_path": "torch.optim.lr_scheduler.MultiStepLR", "init_args": {"milestones": [30, 60, 90], "gamma": 0.1}}
WARM = {"class_path": "knlightning.tasks.CosineLR", "init_args": {"final": 0.0, "warmup": 5, "warmup_start": 0.01}}
POLY = {"class_path": "knlightning.tasks.PolyLR", "init_args": {"power": 0.9}}
HALVES = {"class_path": "torch.optim.lr_scheduler.MultiStepLR", "init_args": {"milestones": [70, 90], "gamma": 0.5}}
RECIPES = {  # epochs, images in a step of the optimizer, weight decay, schedule
    "cifar100": (150, 32, 5e-4, COSINE),
    "cifar10": (70, 128, 0.0, COSINE),
    "imagenet": (100, 256, 1e-4, STEPS),
    "cityscapes": (500, 16, 5e-4, POLY),
    "imagenet32": (100, 8192, 0.0, HALVES),
    "imagenet_convnext_tiny": (600, 1024, 0.05, WARM),
    "imagenet_knconvnext_tiny": (600, 1024, 0.05, WARM),
}
OF_OUR_OWN = {"cifar10_knresnet13_dp", "cifar10_resnet13_dp"}  # with no result in the paper
PUBLISHED = [c for c in CONFIGS if c.stem.split("_")[0] in RECIPES and c.stem not in OF_OUR_OWN]
FEW = ["--data.batch_size=2", "--data.eval_batch_size=2", "--trainer.accelerator=cpu", "--trainer.devices=1"]
FEW += [f"--trainer.limit_{stage}_batches=1" for stage in ("train", "val", "test")]
FEW += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
NO_PICTURES = "--pictures.every_n_epochs=0"
# Those that differ from these in the depth of the network alone, and in numbers, train for a step.
KINDS = [config for config in CONFIGS if not config.stem.endswith(("net34", "net50"))]
DEEPER = [config for config in CONFIGS if config not in KINDS]
LONG = {*DEEPER, *(config for config in CONFIGS if re.search(r"_knresnet1[38]_dp$", config.stem))}
SMALL = {  # by the beginning of the configuration's name
    "imagenet": [f"--data.{name}=96" for name in ("train_size", "eval_resize", "eval_size")] + ["--data.num_workers=0"],
    "cityscapes": ["--data.crop_size=[16, 24]", "--data.num_workers=0"],
    "photos": ["--data.num_workers=0"],
    "finetune": [f"--data.{name}=96" for name in ("train_size", "eval_resize", "eval_size")]
    + ["--data.root=data/imagenet", "--data.num_workers=0"],
    "parquet": ["--data.cache_dir=cache", "--data.num_workers=0"],
}


def test_there_are_configurations():
    assert {row.path.name for row in ROWS} == {config.name for config in PUBLISHED}
    assert len(CONFIGS) > len(PUBLISHED)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with few images of each dataset, in its format."""
    root = tmp_path_factory.mktemp("data")
    write_cifar10(root)
    write_cifar100(root)
    write_imagenet(root / "imagenet")
    write_cityscapes(root / "cityscapes")
    write_imagenet32(root / "imagenet32")
    write_parquet(root / "parquet")
    write_image_folder(root / "folders", count=10)
    (root / "photos").symlink_to(root / "folders" / "train")
    return root


@pytest.fixture
def few(config, data, tmp_path, monkeypatch):
    """Options of a run with few images, in a folder with the data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(data)
    short = ["--model.lr_scheduler.warmup=0"] if "convnext" in config.stem else []  # a warm-up longer than such a run
    return ["--config", str(config), *FEW, *SMALL.get(config.stem.split("_")[0], []), *short]


@pytest.mark.parametrize(
    "config", [pytest.param(c, marks=[pytest.mark.slow] * (c in LONG)) for c in CONFIGS], ids=lambda path: path.stem
)
def test_trains_for_a_step(config, few, tmp_path):
    cli = run(["fit", *few, "--trainer.fast_dev_run=true", "--run_dir=tried"])
    assert cli.trainer.global_step == 1
    assert "val/loss" in cli.trainer.callback_metrics  # a private step may be without samples, and without a loss


def test_each_kind_has_a_configuration_that_does_it_all():
    assert {config.stem[:-2] for config in DEEPER} <= {config.stem[:-2] for config in KINDS}


@pytest.mark.slow
@pytest.mark.parametrize("config", KINDS, ids=lambda path: path.stem)
def test_trains_resumes_tests_and_predicts(config, few, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30), "white").save(tmp_path / "images" / "white.png")
    if config.stem.endswith("_dp"):  # with a budget, the first run would spend it all; the step above has checked
        private = {"target_epsilon": "null", "noise_multiplier": "1", "check": "false"}
        few += [f"--trainer.callbacks.{name}={value}" for name, value in private.items()]
    main(["fit", *few, "--trainer.max_epochs", "1", "--pictures.images=1"])
    main(["fit", *few, "--trainer.max_epochs", "2", "--ckpt_path", "last", NO_PICTURES])
    where = f"runs/{config.stem}/0"
    assert (tmp_path / where / "checkpoints" / "best.ckpt").is_file()
    main(["test", *few, "--ckpt_path", "best"])
    capsys.readouterr()
    main(["predict", *few, "--ckpt_path", "last", "--data.predict_dir", "images"])
    if "_fcn_" in config.stem:
        assert f"Predictions of 1 image: {where}/predictions\n" in capsys.readouterr().out
        assert (tmp_path / where / "predictions" / "label_ids" / "white.png").is_file()
    else:
        assert f"Predictions of 1 image: {where}/predictions.csv" in capsys.readouterr().out
        assert "white.png" in (tmp_path / where / "predictions.csv").read_text()
    shutil.rmtree(tmp_path / where)  # checkpoints of hundreds of megabytes


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_says_what_it_is_and_how_to_run_it(config):
    head = "\n".join(line for line in config.read_text().splitlines() if line.startswith("#"))
    assert f"knl fit --config configs/{config.name}" in head
    for row in ROWS:
        if row.path.name == config.name:
            named = row.table == "1" or (row.table == "3" and row.norm != "kernel")  # a line for each norm
            beside = rf"^# +{row.norm} .*" if named else ""
            assert re.search(beside + re.escape(row.published), head, re.MULTILINE)


@pytest.fixture
def composed(config, capsys):
    """What a configuration is composed to."""
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config), "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("config", PUBLISHED, ids=lambda path: path.stem)
def test_composes_the_recipe_and_takes_what_the_rows_change(config, composed):
    model, data, trainer = (composed[key] for key in ("model", "data", "trainer"))
    task, images = model["init_args"], data["init_args"]
    optimizer, schedule = task["optimizer"], task["lr_scheduler"]
    recipe = RECIPES.get(config.stem, RECIPES[config.stem.split("_")[0]])
    epochs, batch, decay, planned = recipe
    convnext = "convnext" in config.stem
    assert composed["seed_everything"] == 0
    assert trainer["max_epochs"] == epochs
    assert images["batch_size"] * trainer["devices"] * trainer["accumulate_grad_batches"] == batch
    assert optimizer["class_path"] == ("torch.optim.AdamW" if convnext else "torch.optim.SGD")
    assert optimizer["init_args"]["weight_decay"] == decay
    private = config.stem.endswith("_dp")
    assert convnext or optimizer["init_args"]["momentum"] == (0.0 if private else 0.9)
    assert schedule["class_path"] == planned["class_path"]
    assert schedule["init_args"].items() >= planned["init_args"].items()
    cityscapes = config.stem.startswith("cityscapes")
    assert task["lr_scheduler_interval"] == ("step" if cityscapes else "epoch")
    backbone = task["backbone"]["init_args"]
    unit = config.stem.startswith(("cifar", "imagenet32")) and "_kn" in config.stem
    assert images["scaling"] == ("unit" if unit else "standard")
    small = config.stem.startswith(("cifar", "imagenet32"))
    assert convnext or cityscapes or backbone["low_resolution"] == small
    assert task["backbone"]["class_path"] == f"knlightning.models.{config.stem.split('_', 1)[1].removesuffix('_dp')}"
    rows = [row for row in ROWS if row.path.name == config.name]
    keys = {NORM: backbone.get("norm"), LEARNING_RATE: optimizer["init_args"]["lr"], BATCH_SIZE: images["batch_size"]}
    keys[DROPOUT] = backbone.get("dropout_p")
    assert None not in {keys[key] for row in rows for key in row.settings}
    # the file itself is one of the rows
    own = [row for row in rows if all(keys[key] == value for key, value in row.settings.items())]
    assert [(row.learning_rate, row.batch_size) for row in own] == [(keys[LEARNING_RATE], batch)]


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.stem.endswith("_dp")], ids=lambda path: path.stem)
def test_private_runs_state_their_budget(config, composed):
    private = composed["trainer"]["callbacks"][-1]  # --trainer.callbacks.target_epsilon is for the last
    assert private["class_path"] == "knlightning.privacy.DifferentialPrivacy"
    settings = private["init_args"]
    assert settings["target_epsilon"] == 8.0
    assert settings["seed"] is None
    if config.stem.startswith("imagenet32"):  # Table 4
        assert (settings["max_grad_norm"], settings["accountant"]) == (2.0, "rdp")
        assert 1 / 1_281_167 > settings["target_delta"] > 7.75e-7
        assert composed["model"]["init_args"]["backbone"]["init_args"]["activation"] == "mish"


@pytest.mark.parametrize("config", [PROJECT / "configs" / "cityscapes_fcn_resnet18.yaml"])
def test_cityscapes_recipe(composed):
    """What the paper says, and nothing of what only the public code has."""
    expected = {"class_weights": None, "ohem_threshold": None, "eval_window": None, "eval_flip": False}
    assert composed["model"]["init_args"].items() >= (expected | {"eval_scales": [1.0]}).items()
    assert composed["data"]["init_args"].items() >= {"crop_size": [512, 1024], "eval_batch_size": 1}.items()
    assert composed["best_checkpoint"]["monitor"] == "val/miou"
    assert composed["seed_everything"] == 0


@pytest.mark.parametrize("config", [PROJECT / "configs" / "imagenet_knconvnext_tiny.yaml"])
def test_convnext_recipe(composed):
    """What torchvision's recipe for ConvNeXt has besides."""
    expected = {"label_smoothing": 0.1, "mixup_alpha": 0.2, "cutmix_alpha": 1.0, "norm_weight_decay": 0.0}
    assert composed["model"]["init_args"].items() >= expected.items()
    expected = {"train_size": 176, "eval_resize": 232, "eval_size": 224, "random_erasing": 0.1}
    expected |= {"trivial_augment": True, "repeated_augmentation": 4}
    assert composed["data"]["init_args"].items() >= expected.items()
    (average,) = composed["trainer"]["callbacks"]
    assert average["class_path"] == "knlightning.callbacks.EMA"
    # torchvision's rule: 1 - 1e-5 of its default decay for each image seen between two updates in an epoch's share
    assert average["init_args"]["decay"] == pytest.approx(1 - 2e-5 * 1024 * 32 / 600, abs=1e-5)
    assert average["init_args"]["every_n_steps"] == 32
