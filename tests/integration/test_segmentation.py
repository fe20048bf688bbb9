"""Segmentation through the command line, in one process and in two."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from standins import TWO, RandomScenes, run, scores, tiny_config, write_config

from knlightning.commands.main import main
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
    assert alone.keys() == {f"test/{name}" for name in names}
    assert together == pytest.approx(alone, rel=1e-6)
    # validation data are the same
    assert {f"test/{name}": validated[f"val/{name}"] for name in names} == pytest.approx(alone, rel=1e-5)
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
    assert hits / int((labels != 255).sum()) == pytest.approx(alone["test/pixel_acc"], rel=1e-6)
