import json
from pathlib import Path

import pytest

from knlightning.analysis import compare as module
from knlightning.analysis.compare import Trial, compare, run_trial, search_rate

CONFIG = """
model:
  class_path: knlightning.tasks.ClassificationTask
  init_args:
    backbone:
      class_path: knlightning.models.knresnet8
    optimizer:
      class_path: torch.optim.SGD
      init_args: {lr: 0.1}
data:
  class_path: knlightning.data.DigitsDataModule
trainer:
  limit_train_batches: 2
  limit_val_batches: 2
  limit_test_batches: 2
"""


@pytest.mark.parametrize(
    ("accuracies", "best"),
    [([0.5, 0.6, 0.7, 0.6, 0.9], 0.05), ([0.9, 0.8], 0.2), ([0.1, 0.1, 0.8, 0.8, 0.7], 0.05), ([0.1] * 11, 0.2)],
)
def test_the_rate_is_halved_until_the_best_is_passed(
    monkeypatch: pytest.MonkeyPatch, accuracies: list[float], best: float
) -> None:
    given = iter(accuracies)
    monkeypatch.setattr(module, "run_trial", lambda *_: {"val": next(given)})
    assert search_rate("kernel", 2, 0.2, Path("x"), Path("y"), 1, 0.2) == best


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    run = tmp_path / "kernel-batch2-rate0.1-seed0"
    run.mkdir()
    (run / "result.json").write_text(json.dumps({"val": 0.25, "test": 0.5}))
    assert run_trial(Trial("kernel", 2, 0.1, 0), Path("absent.yaml"), tmp_path, 1, 0.2) == {"val": 0.25, "test": 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 1}, "seeds must be at least 2, got 1"),
        ({"val_split": 0.0}, r"val_split must be in \(0, 1\), got 0.0"),
    ],
)
def test_wrong_arguments(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(Path("x.yaml"), **change)


@pytest.mark.slow
def test_the_table_holds_what_the_runs_have_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG)
    compare(config, norms=("none",), batch_sizes=(8,), seeds=2, epochs=1, start_rate=1e-9, out=tmp_path / "runs")
    table = capsys.readouterr().out.strip().splitlines()
    results = [
        json.loads((tmp_path / "runs" / f"none-batch8-rate1e-09-seed{seed}" / "result.json").read_text())["test"]
        for seed in range(2)
    ]
    mean = 50 * sum(results)
    assert table[-1].startswith(f"| none | 8 | 1e-09 | {mean:.2f} ± ")
