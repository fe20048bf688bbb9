"""What a private run has spent: its history, the epsilon of it, and the report that lies beside its checkpoints.

A history is kept by segments: the steps that one start of a run has taken with one noise. Each start has a name of its
own, so that histories can be put together without counting a step twice or not at all: the steps of a segment that two
histories share are the same steps, and all others are others.
"""

import json
import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from knlightning.privacy.accounting import Accountant, Phase, epsilon, merged, total_steps
from knlightning.privacy.plan import Plan
from knlightning.run_directory import NOT_PRIVATE, PRIVACY_REPORT, replacing

REPORT = PRIVACY_REPORT
"""Name of the report, which is written into the run directory with every checkpoint."""

DOUBTS = {
    "shuffled": "NOMINAL: batches were shuffled, and the accountant supposes Poisson sampling",
    "seeded": "sampling and noise can be repeated by those who know the seed",
    "unchecked": "no trial steps have looked for layers and losses that mix samples",
}
"""What may be wrong with a start: its word in the name of the start, so that histories keep it, and what it means."""
_SEGMENTS = "_private_segments"
"""Attribute of a module: the segments of the runs that have trained it."""


class Segment(NamedTuple):
    """The steps that one start of a run has taken with one noise; how many there are is kept apart.

    Attributes:
        start: Name of the start, and its `DOUBTS` behind it.
        noise_multiplier: Standard deviation of the noise over the clipping bound.
        sampling_probability: Probability of each sample to be in a step.
    """

    start: str
    noise_multiplier: float
    sampling_probability: float


Segments = dict[Segment, int]
"""The number of steps in each segment of a history."""


class Ledger:
    """Counts the steps of a run, and of the runs that it goes on from.

    Args:
        target_delta: Probability with which the guarantee may fail.
        accountant: How epsilon is computed; see `knlightning.privacy.accounting.epsilon`.

    Attributes:
        segments: The number of steps taken, by segments.
        restored: The report of the checkpoint that the run goes on from; empty for a new run.
    """

    def __init__(self, target_delta: float, accountant: Accountant) -> None:
        self.target_delta = target_delta
        self.accountant: Accountant = accountant
        self.segments: Segments = {}
        self.restored: dict[str, Any] = {}
        self._epsilon: tuple[list[Phase], float] = [], 0.0
        self.begin()

    @property
    def history(self) -> list[Phase]:
        """The steps taken, in phases."""
        return history_of(self.segments)

    @property
    def doubts(self) -> set[str]:
        """Those of `DOUBTS` that hold for any of the steps taken."""
        return {word for start, *_ in self.segments for word in start.split()} & DOUBTS.keys()

    @property
    def epsilon(self) -> float:
        """What was spent, at `target_delta`."""
        history = self.history
        if self._epsilon[0] != history:  # prv takes half a second
            self._epsilon = history, epsilon(history, self.target_delta, self.accountant)
        return self._epsilon[1]

    def begin(self, *doubts: str) -> None:
        """Begin a start, with what is doubtful about it: the steps that follow are no others' steps."""
        self._start = " ".join((secrets.token_hex(8), *doubts))

    def record(self, noise_multiplier: float, sampling_probability: float) -> None:
        """Count a step."""
        segment = Segment(self._start, noise_multiplier, sampling_probability)
        self.segments[segment] = self.segments.get(segment, 0) + 1

    def restore(self, report: dict[str, Any]) -> None:
        """Take up what a checkpoint says was spent."""
        self.restored = report
        self.add(read_segments(report))

    def add(self, segments: Mapping[Segment, int]) -> int:
        """Count the steps of another history, too.

        They have been released, and are now trained again with other samples and noise, or belong to another run.

        Args:
            segments: The history.

        Returns:
            The number of its steps that were not counted yet.
        """
        before = sum(self.segments.values())
        for segment, steps in segments.items():
            self.segments[segment] = max(steps, self.segments.get(segment, 0))
        return sum(self.segments.values()) - before

    def share(self, module: nn.Module) -> int:
        """Let a network remember what its training has spent, and count what it remembers.

        Its trainable parts remember it too, in another task and in copies.

        Args:
            module: The network or task that will be trained.

        Returns:
            The number of steps that were not counted yet.
        """
        parts = [part for part in module.modules() if any(p.requires_grad for p in part.parameters())]
        added = sum([self.add(vars(part).get(_SEGMENTS, {})) for part in parts])
        for part in parts:
            vars(part)[_SEGMENTS] = self.segments
        return added

    def report(self, promise: dict[str, Any], plan: Plan | None) -> dict[str, Any]:
        """Return what was promised and what was spent, in plain values.

        Args:
            promise: Target and settings of the run.
            plan: Its steps.
        """
        return {
            "epsilon": self.epsilon if math.isfinite(self.epsilon) else None,
            **promise,
            "sampling": "shuffled; epsilon is nominal" if "shuffled" in self.doubts else "poisson",
            "seeded": "seeded" in self.doubts,
            "checked": "unchecked" not in self.doubts,
            "plan": asdict(plan) if plan else {},
            "history": [list(phase) for phase in self.history],
            "segments": [[*segment, steps] for segment, steps in self.segments.items()],
        }


def statement(report: dict[str, Any]) -> str:
    """Put what was spent into a sentence, with what it rests on.

    Args:
        report: That of a run.
    """
    doubt = said_of(doubts_of(report))
    if report["accountant"] == "gdp":
        doubt += "; gdp understates epsilon"
    spent, plan = report["epsilon"], report["plan"]
    return (
        f"epsilon {math.inf if spent is None else spent:.3f} at delta {report['target_delta']:g}"
        f" ({report['accountant']}), after {total_steps(report['history'])} steps with noise"
        f" {plan['noise_multiplier']:.4g}, clipping at {report['max_grad_norm']:g} and a sampling rate of"
        f" {plan['sampling_probability']:.4g}{doubt}"
    )


def doubts_of(report: dict[str, Any]) -> set[str]:
    """Return those of `DOUBTS` that a report tells of."""
    holds = {
        "shuffled": report.get("sampling", "poisson") != "poisson",
        "seeded": report.get("seeded", False),
        "unchecked": not report.get("checked", True),
    }
    return {doubt for doubt in holds if holds[doubt]}


def said_of(doubts: Iterable[str]) -> str:
    """Put doubts into words, to stand behind a statement."""
    return "".join(f"; {said}" for word, said in DOUBTS.items() if word in doubts)


def history_of(segments: Mapping[Segment, int]) -> list[Phase]:
    """Return the phases of a history."""
    return merged([Phase(*segment[1:], steps) for segment, steps in segments.items()])


def read_segments(report: dict[str, Any]) -> Segments:
    """Read the segments of a report, with those of other runs in the same directory."""
    rows = [*report["segments"], *report.get("other_segments", [])]
    # those that earlier reports do not have in the names of starts
    more = doubts_of(report).difference(*(str(start).split() for start, *_ in rows))
    return {
        Segment(" ".join((str(start), *sorted(more))), float(noise), float(probability)): int(steps)
        for start, noise, probability, steps in rows
    }


def write_report(directory: Path, report: dict[str, Any]) -> None:
    """Write the report of a run into its directory; what it tells of other runs that lie there is kept."""
    try:
        there = read_report(directory) or {}
    except ValueError:  # it was said when the run began
        there = {}
    own = {(str(start), noise, probability) for start, noise, probability, _ in report["segments"]}
    found = read_segments(there) if there else {}
    others = [[*segment, steps] for segment, steps in found.items() if tuple(segment) not in own]
    kept = {"other_segments": others} if others else {}
    if NOT_PRIVATE in there:
        kept[NOT_PRIVATE] = there[NOT_PRIVATE]
    write_json(directory / REPORT, report | kept)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a file of plain values, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n")


def read_report(directory: Path) -> dict[str, Any] | None:
    """Read the report in a directory; None if there is none.

    Raises:
        ValueError: If it is damaged.
    """
    path = directory / REPORT
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        if total_steps(report["history"]) < 0 or not isinstance(report["plan"], dict):
            raise ValueError("its history or plan")
        for segment, steps in read_segments(report).items():
            if not (segment.noise_multiplier >= 0 and 0 <= segment.sampling_probability <= 1 and steps >= 0):
                raise ValueError(f"{segment}: {steps} steps")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    return report
