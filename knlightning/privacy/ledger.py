"""What a private run has spent: its history, the epsilon of it, and the report that lies beside its checkpoints."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from knlightning.privacy.accounting import Accountant, Phase, epsilon, merged, total_steps
from knlightning.privacy.plan import Budget, Plan
from knlightning.run_directory import replacing

REPORT = "privacy.json"
"""Name of the report, which is written into the run directory with every checkpoint."""

OLD_PLAN_KEYS = {
    "samples": "num_samples",
    "batch": "batch_size",
    "rate": "sampling_probability",
    "epoch_steps": "steps_per_epoch",
    "steps": "num_steps",
    "noise": "noise_multiplier",
    "last_step": "affordable_steps",
}
"""Names in the plan of earlier reports, and what they are called now."""


class Ledger:
    """Counts the steps of a run, and of the runs that it goes on from.

    Args:
        target_delta: Probability with which the guarantee may fail.
        accountant: How epsilon is computed; see `knlightning.privacy.accounting.epsilon`.

    Attributes:
        history: The steps taken, in phases.
        restored: The report of the checkpoint that the run goes on from; empty for a new run.
    """

    def __init__(self, target_delta: float, accountant: Accountant) -> None:
        self.target_delta = target_delta
        self.accountant: Accountant = accountant
        self.history: list[Phase] = []
        self.restored: dict[str, Any] = {}
        self._epsilon: tuple[list[Phase], float] = [], 0.0

    @property
    def epsilon(self) -> float:
        """What was spent, at `target_delta`."""
        if self._epsilon[0] != self.history:  # prv takes half a second
            self._epsilon = self.history, epsilon(self.history, self.target_delta, self.accountant)
        return self._epsilon[1]

    def record(self, noise_multiplier: float, sampling_probability: float) -> None:
        """Count a step."""
        self.history = merged([*self.history, Phase(noise_multiplier, sampling_probability, 1)])

    def restore(self, report: dict[str, Any]) -> None:
        """Take up what a checkpoint says was spent."""
        self.restored = current_keys(report)
        self.history = read_history(report)

    def recall(self, reports: Iterable[dict[str, Any]]) -> None:
        """Count the steps of later checkpoints, too, than that which the run goes on from.

        They have been released, and are now trained again, with other samples and noise.

        Args:
            reports: What was written beside these checkpoints.
        """
        for history in map(read_history, reports):
            if total_steps(history) > total_steps(self.history):
                self.history = history

    def calibrated_noise(
        self, budget: Budget, sampling_probability: float, num_steps: int | float, steps_taken: int
    ) -> float | None:
        """Return the noise multiplier of the restored run, if it was calibrated for the same; None otherwise.

        Args:
            budget: What this run must keep.
            sampling_probability: Probability of each sample to be in a step.
            num_steps: Number of steps of the whole run.
            steps_taken: Number of steps that the weights have seen.
        """
        report = {**self.restored, **self.restored.get("plan", {})}
        same = {
            "target_epsilon": budget.target_epsilon,
            "target_delta": budget.target_delta,
            "accountant": budget.accountant,
            "sampling_probability": sampling_probability,
            "num_steps": num_steps,
        }
        taken_again = total_steps(self.history) - steps_taken
        if not report or taken_again or any(report[name] != value for name, value in same.items()):
            return None
        return float(report["noise_multiplier"])

    def report(self, promise: dict[str, Any], plan: Plan | None) -> dict[str, Any]:
        """Return what was promised and what was spent, in plain values.

        Args:
            promise: Target and settings of the run.
            plan: Its steps.
        """
        return {
            "epsilon": self.epsilon if math.isfinite(self.epsilon) else None,
            **promise,
            "plan": asdict(plan) if plan else {},
            "history": [list(phase) for phase in self.history],
        }


def statement(report: dict[str, Any]) -> str:
    """Put what was spent into a sentence, with what it rests on.

    Args:
        report: That of a run.
    """
    doubt = ""
    if report["sampling"] != "poisson":
        doubt += "; NOMINAL: batches were shuffled, and the accountant supposes Poisson sampling"
    if report["accountant"] == "gdp":
        doubt += "; gdp understates epsilon"
    if report["seeded"]:
        doubt += "; sampling and noise can be repeated by those who know the seed"
    spent, plan = report["epsilon"], report["plan"]
    return (
        f"epsilon {math.inf if spent is None else spent:.3f} at delta {report['target_delta']:g}"
        f" ({report['accountant']}), after {total_steps(read_history(report))} steps with noise"
        f" {plan['noise_multiplier']:.4g}, clipping at {report['max_grad_norm']:g} and a sampling rate of"
        f" {plan['sampling_probability']:.4g}{doubt}"
    )


def read_history(report: dict[str, Any]) -> list[Phase]:
    """Read the history of a report."""
    return [Phase(float(noise), float(probability), int(steps)) for noise, probability, steps in report["history"]]


def current_keys(report: dict[str, Any]) -> dict[str, Any]:
    """Give the plan of a report today's names, if it has earlier ones."""
    plan = {OLD_PLAN_KEYS.get(name, name): value for name, value in report["plan"].items()}
    return {**report, "plan": plan}


def write_report(directory: Path, report: dict[str, Any]) -> None:
    """Write the report of a run into its directory."""
    with replacing(directory / REPORT) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")


def read_reports(directories: Sequence[Path]) -> list[dict[str, Any]]:
    """Read the reports in some directories, with today's names; those that have one."""
    paths = [directory / REPORT for directory in directories]
    return [current_keys(json.loads(path.read_text())) for path in paths if path.is_file()]
