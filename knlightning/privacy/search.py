"""The privacy of a search over hyperparameters: of all its runs together, for all of them have seen the samples.

The runs are composed, which holds however they were chosen, one after the other or by the results of those before.
Papernot and Steinke (2022) show that the best of several runs alone costs less, if their number is drawn at random and
each run draws its hyperparameters at random, independent of the others. A search that halves a learning rate until it
is passed, repeats the best, and shows the accuracy of every run does neither.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from knlightning.privacy.accounting import Phase, epsilon, merged, total_steps
from knlightning.privacy.ledger import REPORT, doubts_of, history_of, read_report, read_segments, said_of, write_json
from knlightning.run_directory import NOT_PRIVATE

SEARCH_REPORT = "search_privacy.json"
"""Name of the report of a search, in its directory."""
PART = "part_of_search"
"""Key of the report of a run that is one of a search."""


def search_report(directories: Sequence[Path]) -> dict[str, Any] | None:
    """Compose what the runs of a search have spent.

    Args:
        directories: Those of the runs.

    Returns:
        What all have spent together, in plain values; None if no run is private.
    """
    reports = {directory: _read(directory) for directory in directories}
    private = [report for report in reports.values() if report is not None]
    if not private:
        return None
    history = merged([phase for report in private for phase in history_of(read_segments(report))])
    accountant = private[0]["accountant"]
    if accountant == "gdp":  # which cannot compose different runs, and is no bound
        accountant = "prv"
    delta = max(report["target_delta"] for report in private)
    kept = min(report.get("accounted_delta", report["target_delta"]) / report["target_delta"] for report in private)
    uncounted = [str(d) for d, report in reports.items() if report is None or NOT_PRIVATE in report]
    spent = math.inf if uncounted else epsilon(history, kept * delta, accountant)
    return {
        "epsilon": spent if math.isfinite(spent) else None,
        "target_delta": delta,
        "accountant": accountant,
        "doubts": sorted(set().union(*map(doubts_of, private))),
        "runs": len(directories),
        "runs_without_privacy": uncounted,
        "largest_epsilon_of_a_run": max((report["epsilon"] or 0.0 for report in private), default=0.0),
        "history": [list(phase) for phase in history],
    }


def search_statement(report: dict[str, Any]) -> str:
    """Put what a search has spent into a sentence.

    Args:
        report: That of the search.
    """
    if report["runs_without_privacy"]:
        return f"nothing bounds it: {', '.join(report['runs_without_privacy'])} did not count, or did not keep, privacy"
    spent = report["epsilon"]
    steps = total_steps([Phase(*phase) for phase in report["history"]])
    return (
        f"epsilon {math.inf if spent is None else spent:.3f} at delta {report['target_delta']:g}"
        f" ({report['accountant']}) for all {report['runs']} runs together, {steps} steps; up to"
        f" {report['largest_epsilon_of_a_run']:.3f} for one of them alone" + said_of(report["doubts"])
    )


def write_search_report(out: Path, directories: Sequence[Path]) -> str | None:
    """Write what a search has spent, and say in the reports of its runs that theirs is not all.

    Args:
        out: Directory of the search.
        directories: Those of its runs so far.

    Returns:
        A sentence; None if no run is private.
    """
    report = search_report(directories)
    if report is None:
        return None
    write_json(out / SEARCH_REPORT, report)
    for directory in directories:
        if (run := _read(directory)) is not None:
            said = f"one of the runs of a search; what all of them have spent is in {out / SEARCH_REPORT}"
            write_json(directory / REPORT, {PART: said, **run})
    return search_statement(report)


def _read(directory: Path) -> dict[str, Any] | None:
    try:
        return read_report(directory)
    except ValueError:  # damaged
        return None
