"""How much privacy a run of DP-SGD costs.

The guarantee is (epsilon, delta)-differential privacy with respect to adding or removing one training sample, for
batches drawn by Poisson sampling. The number of samples and the sampling probability are public.
"""

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from opacus.accountants import RDPAccountant, create_accountant
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

from knlightning.checks import check_choice

Accountant = Literal["rdp", "prv", "gdp"]
"""How epsilon is computed; see `epsilon`."""
GDP_WARNING = (
    "accountant gdp: an approximation by the central limit theorem, which understates epsilon (8.43 where it says 8, in"
    " the setting of the paper's Table 4); for a guarantee use prv or rdp"
)


class Phase(NamedTuple):
    """Steps in a row of one kind: Gaussian noise on the sum of a Poisson sample.

    Args:
        noise_multiplier: Standard deviation of the noise over the clipping bound.
        sampling_probability: Probability of each sample to be in a step.
        num_steps: Number of these steps.
    """

    noise_multiplier: float
    sampling_probability: float
    num_steps: int


History = Sequence[Phase]
"""What an accountant needs to know of a run: its phases in their order."""


def epsilon(history: History, delta: float, accountant: Accountant) -> float:
    """Compute the epsilon that a history has spent.

    Args:
        history: The steps taken. A noise multiplier of 0 gives no privacy, and an infinite epsilon.
        delta: Probability, in (0, 1), with which the guarantee may fail.
        accountant: "rdp" (Rényi divergences; Mironov, 2017), "prv" (privacy random variables, tighter, an upper bound
            within 0.01; Gopi et al., 2021) or "gdp" (a central limit; understates).

    Returns:
        Epsilon, at least 0.

    Raises:
        ArgumentError: If the accountant is unknown.
        ValueError: If it is gdp, and the noise or the sampling probability changes within the history.
    """
    check_choice("accountant", accountant, get_args(Accountant))
    history = [phase for phase in merged(history) if phase.num_steps > 0]
    if not history:
        return 0.0
    if any(phase.noise_multiplier == 0 for phase in history):
        return math.inf
    if accountant == "gdp" and len(history) > 1:
        raise ValueError(
            "accountant gdp cannot follow a run whose noise or sampling probability has changed; use prv or rdp"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of gdp, about itself; of rdp, that its largest order was best
        if accountant == "rdp":
            divergences = sum(_divergences(*phase[:2]) * phase.num_steps for phase in history)
            return float(get_privacy_spent(orders=RDPAccountant.DEFAULT_ALPHAS, rdp=divergences, delta=delta)[0])
        opacus_accountant = create_accountant(mechanism=accountant)
        opacus_accountant.history = [tuple(phase) for phase in history]
        return float(opacus_accountant.get_epsilon(delta=delta))


@lru_cache(maxsize=1024)
def _divergences(noise_multiplier: float, sampling_probability: float) -> np.ndarray:
    """Compute the Rényi divergences of one step, which add up over steps; a quarter of a second for each noise."""
    orders: Any = RDPAccountant.DEFAULT_ALPHAS
    return compute_rdp(q=sampling_probability, noise_multiplier=noise_multiplier, steps=1, orders=orders)


def merged(history: History) -> list[Phase]:
    """Join neighbouring phases of a history that differ in their number of steps only."""
    phases: list[Phase] = []
    for noise_multiplier, sampling_probability, num_steps in history:
        if phases and phases[-1][:2] == (noise_multiplier, sampling_probability):
            num_steps += phases.pop().num_steps
        phases.append(Phase(noise_multiplier, sampling_probability, num_steps))
    return phases


def total_steps(history: History) -> int:
    """Count the steps of a history."""
    return sum(num_steps for _, _, num_steps in history)
