import csv
from pathlib import Path
from typing import get_args

import pytest
import yaml

from knlightning.analysis import trials
from knlightning.analysis.compare import NETWORKS, compare, main, table
from knlightning.analysis.sweep import Search, Trial
from knlightning.nn import Norm

CONFIG = """
model:
  class_path: knlightning.tasks.ClassificationTask
  init_args:
    backbone:
      class_path: knlightning.models.resnet8
      init_args: {num_classes: 10}
    optimizer:
      class_path: torch.optim.SGD
      init_args: {lr: 0.1}
data:
  class_path: knlightning.data.DigitsDataModule
pictures:
  every_n_epochs: 0
trainer:
  accelerator: cpu
  limit_train_batches: 2
  limit_val_batches: 2
  limit_test_batches: 2
"""


def test_every_normalization_is_compared_by_default() -> None:
    assert set(NETWORKS["resnet8"]) == set(get_args(Norm)) - {"sync_batch"}
    assert NETWORKS["knresnet8"] == ["kernel"]


def test_a_row_a_network_and_two_columns_a_batch_size() -> None:
    def found(rate: float, *test: float) -> Search:
        return Search([Trial(rate, seed, 0.5, t, False, Path()) for seed, t in enumerate(test)], rate, [])

    searches = {
        ("resnet8", "batch", 2): found(0.1, 0.5, 0.7),
        ("resnet8", "batch", 32): found(0.2, 0.25, 0.25),
        ("knresnet8", "kernel", 2): found(0.05, 1.0, 0.98),
        ("knresnet8", "kernel", 32): found(0.025, 0.9, 0.9),
    }
    assert table(searches).splitlines() == [
        "| network | normalization | B=2 | rate | B=32 | rate |",
        "| --- | --- | --- | --- | --- | --- |",
        "| resnet8 | batch | 60.00 ± 14.14 | 0.1 | 25.00 ± 0.00 | 0.2 |",
        "| knresnet8 | kernel | 99.00 ± 1.41 | 0.05 | 90.00 ± 0.00 | 0.025 |",
    ]


def test_a_learning_rate_and_a_length_are_needed_for_each_batch_size() -> None:
    with pytest.raises(ValueError, match="--epochs must have one number for each of the 3 batch sizes, got 2"):
        compare(batch_sizes=(2, 8, 32))
    with pytest.raises(ValueError, match=r"--starts\.resnet8 must have one number for each of the 2 .*, got 0"):
        compare(networks={"resnet8": ["batch"]})


@pytest.mark.slow
def test_runs_become_a_table_and_curves_and_are_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG)
    args = ["--config=tiny.yaml", "--networks={resnet8: [group], knresnet8: [kernel]}", "--batch_sizes=[4]"]
    args += [
        "--starts={resnet8: [1e-9], knresnet8: [1e-9]}",
        "--seeds=2",
        "--epochs=[1]",
        "--max_halvings=0",
        "--model.backbone.low_resolution=false",
    ]
    main(args)
    printed = capsys.readouterr().out
    with Path("runs/compare/compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["network"], row["norm"], row["seed"]) for row in rows] == [
        ("resnet8", "group", "0"),
        ("resnet8", "group", "1"),
        ("knresnet8", "kernel", "0"),
        ("knresnet8", "kernel", "1"),
    ]
    for row, scaling in zip(rows, ("standard", "standard", "unit", "unit"), strict=True):
        config = yaml.safe_load((Path(row["directory"]) / "config.yaml").read_text())
        assert config["model"]["init_args"]["backbone"]["class_path"] == f"knlightning.models.{row['network']}"
        assert config["model"]["init_args"]["backbone"]["init_args"]["norm"] == row["norm"]
        assert config["data"]["init_args"]["scaling"] == scaling
        assert config["data"]["init_args"]["batch_size"] == 4
    for first, second in (rows[:2], rows[2:]):
        mean = 50 * (float(first["test"]) + float(second["test"]))
        assert f"| {first['network']} | {first['norm']} | {mean:.2f} ± " in printed
    assert "resnet8, group, batch size 4: No rate from 1e-09 to 1e-09 has learned more than guessing." in printed
    picture = Path("runs/compare/compare.png")
    assert picture.read_bytes().startswith(b"\x89PNG")

    picture.unlink()
    monkeypatch.setattr(trials, "run", lambda line: pytest.fail(f"started again: {line}"))
    main(args)
    assert picture.is_file()
