"""Every shipped configuration, from training to predictions, on few images."""

import pytest
from PIL import Image
from standins import PROJECT, write_cifar100

from knlightning.cli import main

CONFIGS = sorted((PROJECT / "configs").glob("*.yaml"))


def test_there_are_configurations():
    assert CONFIGS


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_trains_resumes_tests_and_predicts(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_cifar100(tmp_path / "data")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30), "white").save(tmp_path / "images" / "white.png")
    few = ["--config", str(config), "--data.batch_size", "2", "--trainer.accelerator", "cpu"]
    few += [f"--trainer.limit_{stage}_batches={batches}" for stage, batches in (("train", 2), ("val", 1), ("test", 1))]
    main(["fit", *few, "--trainer.max_epochs", "1"])
    main(["fit", *few, "--trainer.max_epochs", "2", "--ckpt_path", "last"])
    run = f"runs/{config.stem}/0"
    assert (tmp_path / run / "checkpoints" / "best.ckpt").is_file()
    for command in ("validate", "test"):
        main([command, *few, "--ckpt_path", "best"])
    capsys.readouterr()
    main(["predict", *few, "--ckpt_path", "last", "--data.predict_dir", "images"])
    assert f"Predictions of 1 images: {run}/predictions.csv" in capsys.readouterr().out
    assert "white.png" in (tmp_path / run / "predictions.csv").read_text()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_says_what_it_is_and_how_to_run_it(config):
    head = [line for line in config.read_text().splitlines() if line.startswith("#")]
    assert any(f"knl fit --config configs/{config.name}" in line for line in head)
