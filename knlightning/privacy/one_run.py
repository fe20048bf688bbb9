"""A lower bound on epsilon from guesses about one run (Steinke, Nasr and Jagielski, NeurIPS 2023)."""

import numpy as np
from scipy import stats

from knlightning.checks import check_number

PRECISION = 1e-6
"""How exactly the bound is found."""


def guessing_p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Bound the probability of so many right guesses, if the mechanism is (epsilon, delta)-differentially private.

    Each of a number of canaries took part with probability 1/2, independently. What came out was used to guess of some
    of them whether they did; nothing was guessed of the others. Source: theorem 5.2 and algorithm 3 in appendix D of
    Steinke, Nasr and Jagielski, Privacy auditing with one (1) training run (NeurIPS 2023).

    Args:
        canaries: Number of canaries.
        guesses: Number of guesses, at most one for each canary.
        right: Number of guesses that are right.
        epsilon: At least 0.
        delta: In [0, 1].

    Returns:
        The p-value: small if the guesses are better than the mechanism allows.

    Raises:
        ArgumentError: If a number is out of its range.
    """
    check_number("guesses", guesses, at_least=0, at_most=canaries, integer=True)
    check_number("right", right, at_least=0, at_most=guesses, integer=True)
    check_number("epsilon", epsilon, at_least=0)
    check_number("delta", delta, at_least=0, at_most=1)
    each = 1.0 / (1.0 + np.exp(-epsilon))  # probability that randomized response tells the truth
    by_epsilon = float(stats.binom.sf(right - 1, guesses, each))
    # what delta adds: i guesses more are right, with a probability of 2 m delta / i at most
    more = np.arange(1, right + 1)
    below = np.cumsum(stats.binom.pmf(right - more, guesses, each))
    by_delta = float((below / more).max(initial=0.0)) * 2 * canaries * delta
    return min(by_epsilon + by_delta, 1.0)


def epsilon_lower_bound(canaries: int, guesses: int, right: int, delta: float, level: float = 0.05) -> float:
    """Find the largest epsilon that guesses about one run refute.

    Args:
        canaries: Number of canaries, as in `guessing_p_value`.
        guesses: Number of guesses; chosen before the guesses are compared with the truth.
        right: Number of guesses that are right.
        delta: In [0, 1].
        level: Probability with which the bound is above the true epsilon, at most; in (0, 1).

    Returns:
        The bound, at least 0: the mechanism is not (epsilon, delta)-private for any smaller epsilon, with confidence 1
        - level.

    Raises:
        ArgumentError: If a number is out of its range.
    """
    check_number("level", level, above=0, below=1)

    def refuted(epsilon: float) -> bool:
        return guessing_p_value(canaries, guesses, right, epsilon, delta) < level

    low, high = 0.0, 1.0
    if not refuted(low):
        return low
    while refuted(high):
        low, high = high, 2 * high
    while high - low > PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
