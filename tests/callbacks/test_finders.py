import pytest
import torch
import yaml
from standins import tiny_config, write_config

from knlightning.commands.main import main

FEW = {"max_epochs": 1, "limit_val_batches": 1, "num_sanity_val_steps": 0}


def finder(name, **arguments):
    return {"class_path": f"knlightning.callbacks.{name}", "init_args": arguments}


@pytest.mark.parametrize(
    ("callback", "keys"),
    [
        (finder("BatchSizeFinder", init_val=8, max_trials=2, steps_per_trial=1), ("data", "init_args", "batch_size")),
        (
            finder("LearningRateFinder", num_training_steps=20),
            ("model", "init_args", "optimizer", "init_args", "lr"),
        ),
    ],
    ids=["batch size", "learning rate"],
)
def test_what_is_found_is_trained_with_and_stays(tmp_path, monkeypatch, callback, keys):
    monkeypatch.chdir(tmp_path)
    other = {"class_path": "lightning.pytorch.callbacks.ModelSummary"}
    config = tiny_config(callbacks=[callback, other], **FEW)
    start = {"batch_size": 64, "lr": 0.5}[keys[-1]]
    main(["fit", "--config", write_config(tmp_path / "a.yaml", config), "--run_dir", "run"])
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (tmp_path / "run" / "config.yaml").read_text().startswith("# knlightning")
    assert [kept["class_path"] for kept in written["trainer"]["callbacks"]] == [other["class_path"]]
    found = written
    for key in keys:
        found = found[key]
    assert found != start
    stored = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    if keys[-1] == "batch_size":
        assert found == 16
        assert stored["global_step"] == -(-1437 // 16)
    else:
        assert stored["configured"]["groups"][0]["initial_lr"] == stored["configured"]["groups"][0]["lr"] == found
        assert (tmp_path / "run" / "learning_rate.png").is_file()
    # by the configuration of the run it goes on, without another search
    main(["fit", "--config", "run/config.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "2"])
    stored = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert stored["epoch"] == 1


def test_too_few_steps_for_a_guess(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = tiny_config(callbacks=[finder("LearningRateFinder", num_training_steps=4)], **FEW)
    with pytest.raises(SystemExit):
        main(["fit", "--config", write_config(tmp_path / "a.yaml", config)])
    assert "num_training_steps must be well above 10, got 4" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*/*"))
