import json

import pytest

from knlightning.privacy.accounting import epsilon
from knlightning.privacy.ledger import REPORT, Ledger, read_reports, statement, write_report
from knlightning.privacy.plan import Budget, Plan

PROMISE = {
    "target_epsilon": 6.0,
    "target_delta": 1e-3,
    "accountant": "rdp",
    "sampling": "poisson",
    "max_grad_norm": 0.5,
    "seeded": False,
}
PLAN = Plan(100, 10, 0.1, 10, 50, 1.25, 50)
EARLIER = {  # a report as it was before its names changed
    **PROMISE,
    "epsilon": 1.0,
    "plan": {
        "samples": 100, "batch": 10, "rate": 0.1, "epoch_steps": 10, "steps": 50, "noise": 1.25, "last_step": 50,
    },
    "history": [[1.25, 0.1, 7]],
}  # fmt: skip


def ledger(steps=0):
    found = Ledger(1e-3, "rdp")
    for _ in range(steps):
        found.record(1.25, 0.1)
    return found


def test_steps_are_counted_and_paid_for():
    spent = ledger()
    assert spent.epsilon == 0.0
    spent.record(1.25, 0.1)
    spent.record(1.25, 0.1)
    assert spent.epsilon == epsilon([(1.25, 0.1, 2)], 1e-3, "rdp")
    spent.record(2.0, 0.1)
    assert spent.history == [(1.25, 0.1, 2), (2.0, 0.1, 1)]
    assert spent.epsilon == epsilon(spent.history, 1e-3, "rdp")


def test_epsilon_is_computed_once_for_each_history(monkeypatch):
    from knlightning.privacy import ledger as module

    calls = []
    monkeypatch.setattr(module, "epsilon", lambda *args: calls.append(args) or 1.0)
    spent = ledger(1)
    assert [spent.epsilon for _ in range(3)] == [1.0] * 3
    assert len(calls) == 1


def test_reports_are_written_and_restored(tmp_path):
    report = ledger(7).report(PROMISE, PLAN)
    assert report["history"] == [[1.25, 0.1, 7]]
    assert report["plan"]["noise_multiplier"] == 1.25
    write_report(tmp_path / "run", report)
    (found,) = read_reports([tmp_path, tmp_path / "run"])
    assert found == report
    again = ledger()
    again.restore(found)
    assert again.history == ledger(7).history
    assert again.report(PROMISE, PLAN) == report


def test_reports_with_earlier_names(tmp_path):
    (tmp_path / REPORT).write_text(json.dumps(EARLIER))
    (found,) = read_reports([tmp_path])
    assert found["plan"] == ledger().report(PROMISE, PLAN)["plan"]
    again = ledger()
    again.restore(EARLIER)
    assert again.restored == found
    assert again.history == [(1.25, 0.1, 7)]
    assert again.calibrated_noise(Budget(6.0, 1e-3, accountant="rdp"), 0.1, 50, 7) == 1.25


def test_later_checkpoints_count():
    spent, report = ledger(3), ledger(5).report(PROMISE, PLAN)
    spent.recall([report, ledger(4).report(PROMISE, PLAN)])
    assert spent.history == [(1.25, 0.1, 5)]
    spent.recall([])
    assert spent.history == [(1.25, 0.1, 5)]


def test_calibrated_noise_is_kept_for_the_same_run_only():
    budget = Budget(6.0, 1e-3, accountant="rdp")
    assert ledger().calibrated_noise(budget, 0.1, 50, 0) is None
    spent = ledger()
    spent.restore(ledger(7).report(PROMISE, PLAN))
    assert spent.calibrated_noise(budget, 0.1, 50, 7) == 1.25
    for other in (
        (budget, 0.1, 50, 6),  # a step is taken again
        (budget, 0.2, 50, 7),
        (budget, 0.1, 60, 7),
        (Budget(5.0, 1e-3, accountant="rdp"), 0.1, 50, 7),
        (Budget(6.0, 1e-4, accountant="rdp"), 0.1, 50, 7),
        (Budget(6.0, 1e-3, accountant="prv"), 0.1, 50, 7),
    ):
        assert spent.calibrated_noise(*other) is None


def test_the_statement_says_what_it_rests_on():
    report = ledger(7).report(PROMISE, PLAN)
    assert statement(report) == (
        f"epsilon {report['epsilon']:.3f} at delta 0.001 (rdp), after 7 steps with noise 1.25, clipping at 0.5 and a"
        " sampling rate of 0.1"
    )
    for change, doubt in (
        ({"sampling": "shuffled; epsilon is nominal"}, "NOMINAL: batches were shuffled"),
        ({"accountant": "gdp"}, "gdp understates epsilon"),
        ({"seeded": True}, "can be repeated by those who know the seed"),
        ({"epsilon": None}, "epsilon inf at"),
    ):
        assert doubt in statement(report | change)


@pytest.mark.parametrize("noise", [0.0, 1.25])
def test_reports_are_plain_json(noise):
    spent = ledger()
    spent.record(noise, 0.1)
    report = spent.report(PROMISE, PLAN)
    assert (report["epsilon"] is None) == (noise == 0.0)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
