import pytest
import torch

from knlightning.analysis import parity
from knlightning.analysis.parity import compare_paths
from knlightning.nn import fused_passes

SMALL = {"channels": 4, "size": 3, "dtypes": (torch.float32,)}


@pytest.mark.slow
def test_both_paths_agree_and_an_error_of_one_is_seen(monkeypatch):
    monkeypatch.setattr(fused_passes, "_PROGRAMS", 1)  # large blocks: a program takes Triton's interpreter some 20 ms
    rows = compare_paths("cpu", **SMALL)
    assert len(rows) == 2 * 2 * 2
    assert all(row["ok"] and row["fused"] < 1e-6 for row in rows)
    plain = parity._results
    monkeypatch.setattr(
        parity, "_results", lambda *args, fused: [t * (1.01 if fused else 1.0) for t in plain(*args, fused=False)]
    )
    assert not any(row["ok"] for row in compare_paths("cpu", **SMALL))
