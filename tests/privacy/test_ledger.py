import copy
import json

import pytest
from torch import nn

from knlightning.privacy.accounting import epsilon
from knlightning.privacy.ledger import (
    REPORT,
    Ledger,
    read_report,
    read_segments,
    statement,
    write_report,
)
from knlightning.privacy.plan import Plan

PROMISE = {
    "target_epsilon": 6.0,
    "target_delta": 1e-3,
    "accountant": "rdp",
    "max_grad_norm": 0.5,
}
PLAN = Plan(100, 10, 0.1, 10, 50, 1.25, 50)


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
    assert read_report(tmp_path) is None
    found = read_report(tmp_path / "run")
    assert found == report
    again = ledger()
    again.restore(found)
    assert again.history == ledger(7).history
    assert again.report(PROMISE, PLAN) == report


def continued(report, steps, noise=1.25):
    """Another start, from a checkpoint."""
    found = Ledger(1e-3, "rdp")
    found.restore(report)
    for _ in range(steps):
        found.record(noise, 0.1)
    return found


def report_of(found):
    return json.loads(json.dumps(found.report(PROMISE, PLAN)))


def test_later_checkpoints_of_a_run_count_once():
    run = ledger(3)
    early = report_of(run)
    run.record(1.25, 0.1)
    late = report_of(run)
    again = continued(early, 0)
    assert [again.add(read_segments(report)) for report in (late, early, late)] == [1, 0, 0]
    assert again.history == [(1.25, 0.1, 4)]


def test_continuations_of_a_checkpoint_are_added_up():
    """Each of them was released. None is a prefix of the other, of whatever lengths they are."""
    start = report_of(ledger(3))
    one, two = continued(start, 5), continued(start, 2, noise=2.0)
    assert two.add(read_segments(report_of(one))) == 5
    assert two.history == [(1.25, 0.1, 8), (2.0, 0.1, 2)]
    three = continued(report_of(one), 1)
    assert three.add(read_segments(report_of(two))) == 2
    assert sum(steps for _, _, steps in three.history) == 3 + 5 + 2 + 1


def test_another_run_does_not_replace_a_history():
    """Also if it has more steps, of less cost."""
    cheap = Ledger(1e-3, "rdp")
    for _ in range(100):
        cheap.record(50.0, 0.1)
    run = continued(report_of(ledger(7)), 0)
    run.add(read_segments(report_of(cheap)))
    assert run.history == [(1.25, 0.1, 7), (50.0, 0.1, 100)]
    assert run.epsilon > epsilon([(1.25, 0.1, 7)], 1e-3, "rdp")


def test_the_reports_of_two_runs_in_a_directory_are_both_kept(tmp_path):
    one, two = report_of(ledger(7)), report_of(ledger(2))
    for report in (one, two, two, one):
        write_report(tmp_path, report)
    found = read_report(tmp_path)
    assert found["history"] == one["history"]
    assert found["other_segments"] == two["segments"]
    assert read_segments(found) == read_segments(one) | read_segments(two)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"plan": {}}', '{"plan": {}, "history": [1]}'])
def test_damaged_reports(tmp_path, text):
    (tmp_path / REPORT).write_text(text)
    with pytest.raises(ValueError, match=r"privacy\.json is damaged"):
        read_report(tmp_path)
    report = report_of(ledger(1))
    write_report(tmp_path, report)
    assert read_report(tmp_path) == report


def test_a_network_remembers_what_has_trained_it():
    """Its trainable parts do, in another task and in copies; parts that are frozen have told nothing."""
    net, first = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ledger()
    net[0].requires_grad_(False)
    assert first.share(net) == 0
    first.record(1.25, 0.1)
    for again in (net, nn.Sequential(net[1]), copy.deepcopy(net)):
        second = ledger()
        assert second.share(again) == 1
        assert second.history == [(1.25, 0.1, 1)]
    assert ledger().share(nn.Sequential(net[0], nn.Linear(2, 2))) == 0
    assert first.share(net) == 0


def test_doubts_are_kept_with_the_steps_that_they_are_about(tmp_path):
    spent = Ledger(1e-3, "rdp")
    spent.begin("shuffled", "seeded")
    assert spent.doubts == set()  # of no steps
    spent.record(1.25, 0.1)
    report = report_of(spent)
    assert (report["sampling"], report["seeded"], report["checked"]) == ("shuffled; epsilon is nominal", True, True)
    again = continued(report, 3)
    assert again.doubts == {"shuffled", "seeded"}
    assert again.add(read_segments(report)) == 0
    earlier = report | {"segments": [["name", 1.25, 0.1, 1]], "seeded": False}  # without doubts in the names
    assert continued(earlier, 1).doubts == {"shuffled"}
    assert continued(earlier, 1).add(read_segments(earlier)) == 0


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
        ({"checked": False}, "no trial steps have looked for layers and losses that mix samples"),
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
