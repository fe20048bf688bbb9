import csv
import json
from pathlib import Path

import pytest
import yaml
from commands.runs import refused
from standins import tiny_config, write_config

from knlightning.commands import trials
from knlightning.commands.main import main

ROWS = """
plain: {model.backbone.dropout_p: 0.0}
dropout: {model.backbone.dropout_p: 0.5, data.scaling: standard}
"""
COMPARISON = f"""
out: here
seeds: 2
max_halvings: 0
settings:
  config: tiny.yaml
  model.optimizer.lr: [1.0e-9, 0.1]
columns:
  "B = 4": {{data.batch_size: 4}}
  "B = 8": {{data.batch_size: 8}}
rows: {json.dumps(yaml.safe_load(ROWS))}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with tiny.yaml and comparison.yaml."""
    monkeypatch.chdir(tmp_path)
    few = {f"limit_{part}_batches": 2 for part in ("train", "val", "test")}
    write_config(tmp_path / "tiny.yaml", tiny_config(max_epochs=1, **few))
    (tmp_path / "comparison.yaml").write_text(COMPARISON)
    return tmp_path


def test_runs_become_a_table_and_pictures_and_are_not_repeated(folder, monkeypatch, capsys):
    args = ["compare", "--config=comparison.yaml", "--only=[B = 4]", "--trainer.log_every_n_steps=1"]
    main(args)
    printed = capsys.readouterr().out
    with Path("here/compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["row"], row["column"], row["seed"]) for row in rows] == [
        (row, "B = 4", seed) for row in ("plain", "dropout") for seed in "01"
    ]
    for row in rows:
        config = yaml.safe_load((Path(row["directory"]) / "config.yaml").read_text())
        assert config["seed_everything"] == int(row["seed"])
        assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 1e-9
        dropout_p = config["model"]["init_args"]["backbone"]["init_args"]["dropout_p"]
        scaling = config["data"]["init_args"]["scaling"]
        assert (dropout_p, scaling) == ((0.0, "unit") if row["row"] == "plain" else (0.5, "standard"))
        assert config["data"]["init_args"]["batch_size"] == 4
        assert config["trainer"]["log_every_n_steps"] == 1
    for first, second in (rows[:2], rows[2:]):
        mean = 50 * (float(first["test"]) + float(second["test"]))
        assert f"| {first['row']} | {mean:.2f} ± " in printed
    assert Path("here/compare.md").read_text() in printed
    for name in ("accuracy.png", "convergence.png"):
        assert Path("here", name).read_bytes().startswith(b"\x89PNG")

    Path("here/accuracy.png").unlink()
    monkeypatch.setattr(trials, "FitCLI", lambda line: pytest.fail(f"started again: {line}"))
    main(args)
    assert Path("here/accuracy.png").is_file()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--seeds=0"], "--seeds must be a whole number at least 1, got 0"),
        (["--only=[B = 5]"], "only must be one of plain, dropout, B = 4, B = 8, got 'B = 5'"),
        (["--data.batch_size=5"], "data.batch_size is settled by this command"),
        (["--model.optimizer.lr=5"], "model.optimizer.lr is settled by this command"),
        (["--columns={a: {}}"], "settings.model.optimizer.lr must be a list of 1 values, one for each column"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_arguments(folder, capsys, args, said):
    assert said in refused(capsys, "compare", "--config=comparison.yaml", *args)
    assert not (folder / "here").exists()
