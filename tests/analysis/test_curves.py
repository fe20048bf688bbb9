from pathlib import Path

import pytest

from knlightning.analysis.curves import curves, read_metrics

METRICS = """step,lr-SGD,val/loss,val/acc,epoch,train/loss,train/acc
0,0.1,,,,,
44,,0.7,0.75,0,,
44,,,,0,0.9,0.6
89,,0.5,0.8,1,,
89,,,,1,0.6,0.7
"""


def test_metrics_are_read_by_epoch(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(METRICS)
    metrics = read_metrics(tmp_path)
    assert metrics["val/acc"] == [(0, 0.75), (1, 0.8)]
    assert metrics["train/loss"] == [(0, 0.9), (1, 0.6)]


def test_curves_become_a_picture(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(METRICS)
    curves([tmp_path, tmp_path], tmp_path / "new" / "curves.png")
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_directory_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no .*metrics\.csv: name the directory of a run"):
        curves([tmp_path], tmp_path / "curves.png")
