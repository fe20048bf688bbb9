"""How much privacy a run of DP-SGD costs, and how much noise a budget asks for.

A history is what an accountant needs to know of a run: (noise multiplier, sampling rate, steps) for each row of steps
that were alike. The guarantee is (epsilon, delta)-differential privacy with respect to adding or removing one training
sample, for batches drawn by Poisson sampling; the number of samples and the sampling rate are public.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Literal, get_args

from opacus.accountants import create_accountant

Mechanism = Literal["rdp", "prv", "gdp"]
Steps = tuple[float, float, int]
History = Sequence[Steps]

TOLERANCE = 1e-3
"""How far below the budget a calibrated epsilon may lie, as a fraction of the budget."""
MOST_NOISE = 1e6
GDP = (
    "accountant gdp: an approximation by the central limit theorem, which understates epsilon (8.43 where it says 8, in"
    " the setting of the paper's Table 4); for a guarantee use prv or rdp"
)


def epsilon(history: History, delta: float, accountant: Mechanism) -> float:
    """Compute the epsilon that a history has spent.

    Args:
        history: the steps taken; noise multipliers of 0 give no privacy, and an infinite epsilon.
        delta: probability, in (0, 1), with which the guarantee may fail.
        accountant: "rdp" (Rényi divergences; Mironov 2017), "prv" (privacy random variables, tighter, an upper bound
            within 0.01; Gopi et al. 2021) or "gdp" (a central limit; understates).

    Raises:
        ValueError: if the accountant is unknown, or is gdp and the history changes its noise or sampling rate.
    """
    if accountant not in get_args(Mechanism):
        raise ValueError(f"accountant must be one of {', '.join(get_args(Mechanism))}, got {accountant!r}")
    history = [steps for steps in merged(history) if steps[2] > 0]
    if not history:
        return 0.0
    if any(noise == 0 for noise, _, _ in history):
        return math.inf
    if accountant == "gdp" and len(history) > 1:
        raise ValueError("accountant gdp cannot follow a run whose noise or sampling rate has changed; use prv or rdp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of gdp, about itself; of rdp, that its largest order was best
        counting = create_accountant(mechanism=accountant)
        counting.history = history
        return float(counting.get_epsilon(delta=delta))


def merged(history: History) -> list[Steps]:
    """Put neighbouring rows of a history that are alike into one."""
    rows: list[Steps] = []
    for noise, rate, steps in history:
        if rows and rows[-1][:2] == (noise, rate):
            steps += rows.pop()[2]
        rows.append((noise, rate, steps))
    return rows


def noise_for(
    target_epsilon: float, delta: float, rate: float, steps: int, accountant: Mechanism, spent: History = ()
) -> float:
    """Find the least noise with which a number of steps stays within a budget.

    Args:
        target_epsilon: the budget, above 0.
        delta: as in :func:`epsilon`.
        rate: sampling rate of the steps.
        steps: how many will be taken.
        accountant: as in :func:`epsilon`.
        spent: steps that were taken before, and count too.

    Returns:
        The noise multiplier: standard deviation of the noise over the clipping bound. Epsilon ends between the budget
        and a thousandth of it below.

    Raises:
        ValueError: if no noise is enough.
    """

    def after(noise: float) -> float:
        return epsilon([*spent, (noise, rate, steps)], delta, accountant)

    low, high = 0.0, 1.0
    while (reached := after(high)) > target_epsilon:
        low, high = high, 2 * high
        if high > MOST_NOISE:
            past = epsilon(spent, delta, accountant)
            raise ValueError(
                f"target_epsilon {target_epsilon:g} cannot be reached with target_delta {delta:g}, {steps} steps and a"
                f" sampling rate of {rate:.3g}, whatever the noise"
                + (f": {past:.3g} is spent already" if past else "")
                + ". Raise the target, or take fewer steps or smaller batches"
            )
    while target_epsilon - reached > TOLERANCE * target_epsilon and high - low > 1e-6 * high:
        middle = (low + high) / 2
        if (found := after(middle)) > target_epsilon:
            low = middle
        else:
            high, reached = middle, found
    return high


def affordable_steps(
    target_epsilon: float, delta: float, noise: float, rate: float, steps: int, accountant: Mechanism, spent: History
) -> int:
    """Count how many of a number of steps a budget pays for.

    Args:
        target_epsilon: the budget.
        delta: as in :func:`epsilon`.
        noise: noise multiplier of the steps.
        rate: their sampling rate.
        steps: how many are wanted.
        accountant: as in :func:`epsilon`.
        spent: steps that were taken before.
    """

    def within(count: int) -> bool:
        return epsilon([*spent, (noise, rate, count)], delta, accountant) <= target_epsilon

    low, high = 0, 1
    while high < steps and within(high):
        low, high = high, min(2 * high, steps)
    if high == steps and within(steps):
        return steps
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return low
