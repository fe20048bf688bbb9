"""Two processes on the CPU."""

import json

import pytest
from standins import knl, tiny_config, write_cifar100, write_config

from knlightning.commands.main import main
from knlightning.run_directory import numbered_runs

TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


def run(*args, cwd):
    process = knl(*args, cwd=cwd)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def scores(directory):
    stored = json.loads((directory / "test" / "test.json").read_text())["scores"]
    return {name: value for name, value in stored.items() if name.startswith("test/") and not name.endswith("_mean")}


@pytest.mark.slow
def test_two_processes_train_together_and_count_every_image_once(tmp_path, monkeypatch, capsys):
    write_cifar100(tmp_path / "data", train=24, test=7)
    config = tiny_config(max_epochs=2, devices=1)
    config["data"] = {"class_path": "knlightning.data.CIFAR100DataModule", "init_args": {"batch_size": 3}}
    config["model"]["init_args"]["backbone"]["init_args"] = {"num_classes": 100}
    config["pictures"] = {"every_n_epochs": 0}
    write_config(tmp_path / "a.yaml", config)
    output = run("fit", "--config", "a.yaml", *TWO, cwd=tmp_path)
    assert output.count("Best: ") == 1
    monkeypatch.chdir(tmp_path)
    (directory,) = numbered_runs("a")  # both have used the same
    assert (directory / "checkpoints" / "best.ckpt").is_file()
    run("fit", "--config", "a.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "3", *TWO, cwd=tmp_path)
    # 7 images: 4 in two batches for one process, 3 in a single batch for the other
    main(["test", "--config", "a.yaml", "--ckpt_path", "last"])
    alone = scores(directory)
    results = directory / "test"
    files = {path.name: path.read_bytes() for path in results.iterdir()}
    run("test", "--config", "a.yaml", "--ckpt_path", "last", *TWO, cwd=tmp_path)
    together = scores(directory)
    assert alone.keys() == {"test/loss", "test/acc", "test/acc_top5"}
    assert together == pytest.approx(alone, rel=1e-6)
    for name in ("predictions.csv", "classes.csv", "confusion.csv"):
        assert (results / name).read_bytes() == files[name]
    pages = [
        file.decode().count("<figure>") for file in (files["mistakes.html"], (results / "mistakes.html").read_bytes())
    ]
    assert pages[0] == pages[1] > 0
