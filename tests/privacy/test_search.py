import json

import pytest

from knlightning.privacy.accounting import epsilon
from knlightning.privacy.ledger import Ledger, read_report, write_report
from knlightning.privacy.plan import Plan
from knlightning.privacy.search import SEARCH_REPORT, search_report, search_statement, write_search_report

PROMISE = {"target_delta": 1e-3, "accountant": "rdp", "max_grad_norm": 0.5}
PLAN = Plan(100, 10, 0.1, 10, 50, 1.25, 50)


def run(folder, steps, noise=1.25, doubts=(), **promise):
    ledger = Ledger(1e-3, "rdp")
    ledger.begin(*doubts)
    for _ in range(steps):
        ledger.record(noise, 0.1)
    write_report(folder, ledger.report(PROMISE | promise, PLAN))
    return folder


def test_all_runs_are_composed(tmp_path):
    runs = [run(tmp_path / "a", 5), run(tmp_path / "b", 7), run(tmp_path / "c", 3, noise=2.0)]
    said = write_search_report(tmp_path, runs)
    report = json.loads((tmp_path / SEARCH_REPORT).read_text())
    assert report == search_report(runs)
    assert report["epsilon"] == epsilon([(1.25, 0.1, 12), (2.0, 0.1, 3)], 1e-3, "rdp")
    assert said == search_statement(report)
    alone = epsilon([(1.25, 0.1, 7)], 1e-3, "rdp")
    assert f"for all 3 runs together, 15 steps; up to {alone:.3f} for one of them alone" in said
    for path in runs:
        assert SEARCH_REPORT in read_report(path)["part_of_search"]
        assert read_report(path)["history"]
    assert write_search_report(tmp_path, runs) == said


def test_runs_that_are_not_private(tmp_path):
    (tmp_path / "plain").mkdir()
    assert write_search_report(tmp_path, [tmp_path / "plain"]) is None
    assert not (tmp_path / SEARCH_REPORT).exists()
    said = write_search_report(tmp_path, [run(tmp_path / "a", 5), tmp_path / "plain"])
    assert "nothing bounds it" in said
    assert json.loads((tmp_path / SEARCH_REPORT).read_text())["epsilon"] is None


def test_what_it_rests_on(tmp_path):
    shuffled = run(tmp_path / "a", 5, doubts=["shuffled"])
    assert "NOMINAL" in search_statement(search_report([shuffled, run(tmp_path / "b", 5)]))
    changed = [run(tmp_path / "c", 5, accountant="gdp"), run(tmp_path / "d", 5, noise=2.0, accountant="gdp")]
    found = search_report(changed)
    assert found["accountant"] == "prv"
    assert found["epsilon"] == pytest.approx(epsilon([(1.25, 0.1, 5), (2.0, 0.1, 5)], 1e-3, "prv"))
