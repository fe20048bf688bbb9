"""The inputs of `knl compare`: each cell is a run that can be made."""

import csv
from pathlib import Path

import pytest
import yaml
from standins import PROJECT

from knlightning.analysis.grid import list_cells
from knlightning.commands.compare import compare
from knlightning.commands.main import main

FILES = sorted((PROJECT / "experiments").glob("*.yaml"))


def read(name):
    return yaml.safe_load((PROJECT / "experiments" / f"{name}.yaml").read_text())


def cells_of(name):
    content = read(name)
    return list_cells(content["rows"], content["columns"], content["settings"])


def test_every_normalization_of_the_digits_is_compared():
    cells = cells_of("compare_digits")
    assert len(cells) == 18
    assert cells["KNResNet-8, kernel", "batches of 32"] == {
        "config": "configs/digits_resnet8.yaml",
        "model.backbone": "knlightning.models.knresnet8",
        "model.backbone.norm": "kernel",
        "model.optimizer.lr": 0.4,
        "data.scaling": "unit",
        "model.backbone.eval_statistics": "clean",
        "data.val_split": 0.2,
        "data.batch_size": 32,
        "trainer.max_epochs": 16,
    }
    for (row, _), settings in cells.items():
        network, norm = row.split(", ")
        assert settings["model.backbone"] == f"knlightning.models.{network.lower().replace('-', '')}"
        assert settings["model.backbone.norm"] == norm
        assert settings["data.scaling"] == ("unit" if norm == "kernel" else "standard")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_cell_is_a_configuration(path, tmp_path, monkeypatch, capsys):
    """As far as its command line is understood; one cell of each row."""
    monkeypatch.chdir(PROJECT)
    seen = set()
    for (row, _), settings in cells_of(path.stem).items():
        if row not in seen:
            seen.add(row)
            with pytest.raises(SystemExit) as stop:
                main(["fit", *(f"--{key}={value}" for key, value in settings.items()), "--print_config"])
            assert stop.value.code == 0
            config = yaml.safe_load(capsys.readouterr().out)
            assert config["model"]["init_args"]["backbone"]["init_args"]["norm"] == settings["model.backbone.norm"]


@pytest.mark.slow
def test_private_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    content = read("private_digits")
    given = {name: content[name] for name in ("rows", "columns", "settings", "max_halvings")}
    few = {"trainer.limit_train_batches": "1", "trainer.max_epochs": "1", "trainer.callbacks.accountant": "rdp"}
    compare(**given, seeds=2, only=["KNResNet-8, kernel", "ε = 8"], out=Path("here"), overrides=few)
    assert "| KNResNet-8, kernel |" in capsys.readouterr().out
    with Path("here/compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["column"], row["learning_rate"], row["seed"]) for row in rows] == [
        ("ε = 8", "0.25", "0"),
        ("ε = 8", "0.25", "1"),
    ]
