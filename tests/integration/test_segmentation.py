"""Segmentation through the command line, in one process and in two."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from standins import TWO, RandomScenes, finished, knl, tiny_config, write_cityscapes, write_config

from knlightning.commands.main import main
from knlightning.data import CityscapesDataModule
from knlightning.run_directory import numbered_runs

SAMPLES = 7


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Batch normalization, whose statistics are buffers; seven images, which two processes cannot share evenly."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config(max_epochs=1, devices=1)
    config["model"] = {
        "class_path": "knlightning.tasks.SegmentationTask",
        "init_args": {
            "backbone": {"class_path": "knlightning.models.fcn_resnet8", "init_args": {"num_classes": 3}},
            "class_weights": [1.0, 2.0, 0.5],
            "eval_window": [8, 8],
            "eval_scales": [1.0, 1.5],
        },
    }
    config["data"] = {"class_path": "standins.RandomScenes", "init_args": {"samples": SAMPLES, "batch_size": 1}}
    config["best_checkpoint"] = {"monitor": "val/miou"}
    return write_config(tmp_path / "a.yaml", config)


def test_trains_resumes_tests_and_predicts(config, tmp_path, capsys):
    main(["fit", "--config", config])
    assert "Best:       val/miou 0." in capsys.readouterr().out
    more = ["--trainer.max_epochs", "2", "--pictures.every_n_epochs", "0"]
    main(["fit", "--config", config, "--ckpt_path", "last", *more])
    main(["test", "--config", config, "--ckpt_path", "best"])
    table = capsys.readouterr().out
    assert all(f"test/{name}" in table for name in ("loss", "miou", "pixel_acc", "mean_acc", "iou/0", "iou/2"))
    main(["predict", "--config", config, "--ckpt_path", "best"])
    assert "Predictions of 7 images: runs/a/0/predictions\n" in capsys.readouterr().out
    where = tmp_path / "runs" / "a" / "0" / "predictions" / "label_ids" / tmp_path.relative_to(tmp_path.anchor)
    with Image.open(where / "3.jpg.png") as image:
        assert image.size == (10, 8)
    columns = (tmp_path / "runs" / "a" / "0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/miou", "val/iou/1", "val/loss"} <= set(columns)


def run(*args, cwd):
    return finished(knl(*args, cwd=cwd))


def scores(directory):
    stored = json.loads((directory / "test" / "test.json").read_text())["scores"]
    return {
        name.removeprefix("test/"): value
        for name, value in stored.items()
        if name.startswith("test/") and not name.endswith("_mean")
    }


def last_validation(directory):
    with (directory / "metrics.csv").open(newline="") as file:
        return {name: float(value) for row in csv.DictReader(file) for name, value in row.items() if value}


@pytest.mark.slow
def test_two_processes_train_together_and_count_every_pixel_once(config, tmp_path, capsys):
    output = run("fit", "--config", "a.yaml", *TWO, cwd=tmp_path)
    assert output.count("Best: ") == 1
    (directory,) = numbered_runs("a")  # both have used the same
    validated = last_validation(directory)
    main(["test", "--config", "a.yaml", "--ckpt_path", "last"])
    alone = scores(directory)
    run("test", "--config", "a.yaml", "--ckpt_path", "last", *TWO, cwd=tmp_path)
    together = scores(directory)
    names = ("loss", "miou", "pixel_acc", "mean_acc", "iou/0", "iou/1", "iou/2")
    assert alone.keys() == set(names)
    assert together == pytest.approx(alone, rel=1e-6)
    # validation data are the same
    assert {name: validated[f"val/{name}"] for name in names} == pytest.approx(alone, rel=1e-5)
    output = run("predict", "--config", "a.yaml", "--ckpt_path", "last", *TWO, cwd=tmp_path)
    assert output.count("Predictions of 7 images: ") == 1
    for folder in ("colours", "overlays", "label_ids"):
        assert len(list((directory / "predictions" / folder).rglob("*.png"))) == SAMPLES
    # what the files say, counted by hand, is what the test has told
    where = directory / "predictions" / "label_ids" / tmp_path.relative_to(tmp_path.anchor)
    labels, hits = RandomScenes(SAMPLES).labels, 0
    for number in range(SAMPLES):
        with Image.open(where / f"{number}.jpg.png") as image:
            hits += int((torch.tensor(np.asarray(image)) == labels[number]).sum())
    assert hits / int((labels != 255).sum()) == pytest.approx(alone["pixel_acc"], rel=1e-6)


def naive_scores(ids, predicted_ids):
    """The scores of pairs of id maps, as their definitions say, pixel after pixel."""
    label_of = {number: label for label, number in enumerate(CityscapesDataModule.label_ids)}
    hits, true, predicted = ([0] * 19 for _ in range(3))
    for id_map, predicted_map in zip(ids, predicted_ids, strict=True):
        for number, other in zip(id_map.flatten().tolist(), predicted_map.flatten().tolist(), strict=True):
            if number in label_of:
                true[label_of[number]] += 1
                predicted[label_of[other]] += 1
                hits[label_of[number]] += number == other
    assert all(true)  # every class occurs
    iou = [h / (t + p - h) for h, t, p in zip(hits, true, predicted, strict=True)]
    scores = {f"iou/{name}": value for name, value in zip(CityscapesDataModule.class_names, iou, strict=True)}
    accuracies = [h / t for h, t in zip(hits, true, strict=True)]
    return scores | {"miou": sum(iou) / 19, "pixel_acc": sum(hits) / sum(true), "mean_acc": sum(accuracies) / 19}


@pytest.mark.slow
def test_cityscapes_in_two_processes(tmp_path, monkeypatch):
    """Scores are those of the files that are read and written."""
    write_cityscapes(tmp_path / "data")
    images, labels = tmp_path / "data" / "leftImg8bit" / "val", tmp_path / "data" / "gtFine" / "val"
    for path in (images / "c").iterdir():
        path.unlink()  # three are left, which two processes cannot share evenly
    config = tiny_config(max_epochs=12, devices=2, strategy="ddp")
    config["model"] = {
        "class_path": "knlightning.tasks.SegmentationTask",
        "init_args": {
            "backbone": {
                "class_path": "knlightning.models.fcn_knresnet8",
                "init_args": {"num_classes": 19, "dropout_p": 0.05},
            },
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            "lr_scheduler": {"class_path": "knlightning.tasks.PolyLR"},
            "lr_scheduler_interval": "step",
        },
    }
    arguments = {"root": "data", "crop_size": [32, 48], "batch_size": 1, "num_workers": 0}
    config["data"] = {"class_path": "knlightning.data.CityscapesDataModule", "init_args": arguments}
    config["best_checkpoint"] = {"monitor": "val/miou"}
    config["pictures"] = {"every_n_epochs": 0}
    write_config(tmp_path / "a.yaml", config)
    last = ["--config", "a.yaml", "--ckpt_path", "last"]
    assert "Best:       val/miou 0." in run("fit", "--config", "a.yaml", cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    (directory,) = numbered_runs("a")
    # 6 images, one for each process and step
    assert torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 36
    run("test", *last, cwd=tmp_path)
    tested = scores(directory)
    validated = last_validation(directory)  # of the same data
    assert {name: validated[f"val/{name}"] for name in tested} == pytest.approx(tested, rel=1e-5)
    run("predict", *last, "--data.predict_dir", str(images), cwd=tmp_path)

    def read(path):
        with Image.open(path) as image:
            return np.asarray(image)

    files = sorted(images.rglob("*.png"))
    assert len(files) == 3
    ids = [read(labels / file.parent.name / file.name.replace("leftImg8bit", "gtFine_labelIds")) for file in files]
    predicted = [read(directory / "predictions" / "label_ids" / file.relative_to(images)) for file in files]
    naive = naive_scores(ids, predicted)
    assert len({int(number) for id_map in predicted for number in np.unique(id_map)}) > 3  # they have learned a little
    assert {name: value for name, value in tested.items() if name != "loss"} == pytest.approx(naive, abs=1e-6)
