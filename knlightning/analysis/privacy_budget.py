"""The epsilon of a private run by its noise: how much one costs in the other."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from knlightning.privacy.accounting import Accountant, Phase, epsilon

FACTORS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0)
"""Noise multipliers that are compared, relative to that of the run."""


class Cost(NamedTuple):
    """What a noise costs.

    Attributes:
        noise_multiplier: Standard deviation of the noise over the clipping bound.
        epsilon: Of all steps of the run.
    """

    noise_multiplier: float
    epsilon: float


def costs_of_noise(run: Phase, delta: float, accountant: Accountant) -> list[Cost]:
    """Compute epsilon for noise multipliers around that of a run.

    Args:
        run: Its steps, with noise.
        delta: Probability with which the guarantee may fail.
        accountant: How epsilon is computed; see `knlightning.privacy.accounting.epsilon`.

    Returns:
        One for each of `FACTORS`.
    """
    noises = [factor * run.noise_multiplier for factor in FACTORS]
    return [Cost(noise, epsilon([run._replace(noise_multiplier=noise)], delta, accountant)) for noise in noises]


def draw_costs(costs: Sequence[Cost], run: Phase, delta: float) -> Figure:
    """Draw epsilon by noise."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.loglog(*zip(*costs, strict=True), marker=".")
    for cost in costs:
        if cost.noise_multiplier == run.noise_multiplier:
            axes.plot(*cost, "o", color="C1", label=f"this run: noise {cost[0]:.3g}, ε {cost[1]:.3g}")
            axes.legend()
    axes.set_xlabel("noise multiplier")
    axes.set_ylabel(f"ε at δ = {delta:g}")
    axes.set_title(f"{run.num_steps} steps, sampling probability {run.sampling_probability:.3g}")
    axes.grid(which="both", alpha=0.3)
    return figure
