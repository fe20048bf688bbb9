import csv
from pathlib import Path

import pytest
from standins import PROJECT

from experiments.draw_scenes import main as draw
from knlightning.commands.main import main

FEW = ["--data.train_scenes=16", "--data.eval_scenes=4", "--trainer.accelerator=cpu", "--pictures.every_n_epochs=0"]


@pytest.mark.slow
def test_runs_become_a_table_and_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    comparison = PROJECT / "experiments" / "compare_scenes.yaml"
    args = [f"--config={comparison}", "--only=[kernel]", "--seeds=1", "--max_halvings=0", "--trainer.max_epochs=1"]
    main(["compare", *args, *FEW])
    printed = capsys.readouterr().out
    with Path("runs/compare_scenes/compare.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert 0 < float(row["test"]) < 1
    assert f"| kernel | {100 * float(row['test']):.2f} |" in printed
    draw(Path("runs/compare_scenes"))
    assert Path("runs/compare_scenes/scenes.png").read_bytes().startswith(b"\x89PNG")
