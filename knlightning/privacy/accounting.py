"""How much privacy a run of DP-SGD costs.

The guarantee is (epsilon, delta)-differential privacy in the zero-out relation: a training sample is replaced by one
that contributes nothing. The number of samples is public, and batches are drawn by Poisson sampling. A step then costs
what a step costs in the add-or-remove relation with a fixed sampling probability, for which the accountants are
written; the proof is in `docs/privacy.md`.
"""

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from opacus.accountants import create_accountant
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

from knlightning.checks import check_choice

Accountant = Literal["rdp", "prv", "pld", "gdp"]
"""How epsilon is computed; see `epsilon`."""
GDP_WARNING = (
    "accountant gdp: an approximation by the central limit theorem, which understates epsilon (8.43 where it says 8, in"
    " the setting of the paper's Table 4); for a guarantee use prv, pld or rdp"
)
RDP_ORDERS = [1 + tenths / 10 for tenths in range(1, 100)] + [*range(11, 64), 64, 96, 128, 192, 256, 512, 1024]
"""Orders of Rényi divergences. The large ones are for small epsilons: none is below log(1 / delta) / 1023."""
PRV_ERROR = 0.01
"""Largest error of privacy random variables in epsilon; a small epsilon gets a smaller one."""
PRV_POINTS = 2**22
"""Largest number of points at which their distribution is computed, for a second or two; a power of two."""
LARGEST_EPSILON = 200.0
"""Epsilon by Rényi divergences above which nothing tighter is computed: there is no privacy that it could tell of."""


class Phase(NamedTuple):
    """Steps in a row of one kind: Gaussian noise on the sum of a Poisson sample.

    Attributes:
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
            within 0.01 or half a percent; Gopi et al., 2021), "pld" (privacy loss distributions of dp-accounting, about
            as tight; Doroshenko et al., 2022) or "gdp" (a central limit; understates). Above 200, and where "prv" would
            need too much memory, both are what "rdp" says.

    Returns:
        Epsilon, at least 0.

    Raises:
        ArgumentError: If the accountant is unknown.
        ValueError: If it is gdp, and the noise or the sampling probability changes within the history; or if it is pld,
            and dp-accounting is not installed.
    """
    check_choice("accountant", accountant, get_args(Accountant))
    history = [phase for phase in merged(history) if phase.num_steps > 0]
    if not history:
        return 0.0
    if any(phase.noise_multiplier == 0 for phase in history):
        return math.inf
    if accountant == "gdp":
        if len(history) > 1:
            raise ValueError(
                "accountant gdp cannot follow a run whose noise or sampling probability has changed; use prv, pld or"
                " rdp"
            )
        return _by_opacus("gdp", history, delta=delta)
    bound = _rdp(history, delta)
    if accountant == "rdp" or bound > LARGEST_EPSILON:
        return bound
    pld = accountant == "pld"
    return min(bound, epsilon_by_pld(history, delta, bound / 10_000) if pld else _prv(history, delta, bound))


def merged(history: History) -> list[Phase]:
    """Join the phases of a history that differ in their number of steps only; epsilon does not depend on the order."""
    steps: dict[tuple[float, float], int] = {}
    for noise_multiplier, sampling_probability, num_steps in history:
        kind = noise_multiplier, sampling_probability
        steps[kind] = steps.get(kind, 0) + num_steps
    return [Phase(*kind, num_steps) for kind, num_steps in steps.items()]


def total_steps(history: History) -> int:
    """Count the steps of a history."""
    return sum(num_steps for _, _, num_steps in history)


def _by_opacus(mechanism: str, history: History, **settings: Any) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of gdp, about itself
        accountant = create_accountant(mechanism=mechanism)
        accountant.history = [tuple(phase) for phase in history]
        return float(accountant.get_epsilon(**settings))


@lru_cache(maxsize=1024)
def _divergences(noise_multiplier: float, sampling_probability: float) -> np.ndarray:
    """Compute the Rényi divergences of one step, which add up over steps; a quarter of a second for each noise."""
    return compute_rdp(q=sampling_probability, noise_multiplier=noise_multiplier, steps=1, orders=RDP_ORDERS)


def _rdp(history: History, delta: float) -> float:
    divergences = sum(_divergences(*phase[:2]) * phase.num_steps for phase in history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its smallest or largest order was best
        return float(get_privacy_spent(orders=RDP_ORDERS, rdp=divergences, delta=delta)[0])


def _prv(history: History, delta: float, bound: float) -> float:
    """Compute epsilon by privacy random variables, with an error that suits it; infinite if that takes too many points.

    Args:
        history: Steps with noise.
        delta: As in `epsilon`.
        bound: An upper bound on epsilon.
    """
    steps, delta_error = total_steps(history), delta / 1000
    # Opacus computes at even distances in [-span, span] (Gopi et al., 2021, remark 5.6). Their number follows from the
    # error; a power of two makes Fourier transforms fast, and lets all epochs of a run have the same plan of them
    tails = [_rdp(history, delta_error / 4)]
    tails += [_rdp([phase._replace(num_steps=1)], delta_error / 8 / steps) for phase in history]
    with_error_1 = (max(tails) + 3) * math.sqrt(steps * math.log(12 / delta_error) / 2)  # distances from 0 to span
    wanted = with_error_1 / min(PRV_ERROR, bound / 200)
    points = min(PRV_POINTS, 2 ** math.ceil(math.log2(2 * wanted + 3)))
    error = with_error_1 / (points / 2 - 1.5)  # half a distance away from where rounding would decide
    if error > bound / 20:
        return math.inf
    found = _by_opacus("prv", history, delta=delta, delta_error=delta_error, eps_error=error)
    return found if found > 0 else math.inf


def epsilon_by_pld(history: History, delta: float, interval: float) -> float:
    """Compute epsilon by privacy loss distributions of dp-accounting, rounded up everywhere.

    Args:
        history: Steps with noise.
        delta: As in `epsilon`.
        interval: Distance of the values of privacy loss.

    Raises:
        ValueError: If dp-accounting is not installed.
    """
    try:
        from dp_accounting import dp_event
        from dp_accounting.pld import PLDAccountant
    except ImportError:
        raise ValueError(
            "accountant pld and knl audit-privacy need dp-accounting, which is not installed: pip install"
            " 'knlightning[privacy]'"
        ) from None
    accountant = PLDAccountant(value_discretization_interval=interval)
    for phase in history:
        noise = dp_event.GaussianDpEvent(phase.noise_multiplier)
        step = dp_event.PoissonSampledDpEvent(phase.sampling_probability, noise)
        accountant.compose(dp_event.SelfComposedDpEvent(step, phase.num_steps))
    return float(accountant.get_epsilon(delta))
