"""The bound against values that can be computed by hand, and against mechanisms whose epsilon is known."""

import math

import numpy as np
import pytest
from scipy import stats

from knlightning.checks import ArgumentError
from knlightning.privacy.one_run import epsilon_lower_bound, guessing_p_value


@pytest.mark.parametrize("guesses", [5, 100, 1000])
@pytest.mark.parametrize("level", [0.05, 0.001])
def test_all_guesses_right(guesses, level):
    """Randomized response is right so often with probability (1 + e^-epsilon)^-guesses."""
    expected = -math.log(level ** (-1 / guesses) - 1)
    assert epsilon_lower_bound(1000, guesses, guesses, 0.0, level) == pytest.approx(max(expected, 0.0), abs=1e-5)


def test_what_delta_adds():
    """By a loop as it is written in the paper."""
    for guesses, right, epsilon, delta in ((10, 7, 0.5, 1e-3), (40, 40, 2.0, 1e-4), (3, 0, 0.1, 0.01)):
        truth, total, most = 1 / (1 + math.exp(-epsilon)), 0.0, 0.0
        for i in range(1, right + 1):
            total += stats.binom.pmf(right - i, guesses, truth)
            most = max(most, total / i)
        expected = sum(stats.binom.pmf(k, guesses, truth) for k in range(right, guesses + 1)) + most * delta * 2 * 50
        assert guessing_p_value(50, guesses, right, epsilon, delta) == pytest.approx(min(1.0, expected))


def test_guesses_that_are_no_better_than_chance_tell_nothing():
    assert epsilon_lower_bound(100, 100, 50, 1e-5) == 0.0
    assert epsilon_lower_bound(100, 0, 0, 1e-5) == 0.0


@pytest.mark.parametrize(("guesses", "epsilon"), [(20, 0.1), (20, 1.0), (500, 1.0), (500, 4.0)])
def test_randomized_response_passes_its_epsilon_no_more_often_than_the_level(guesses, epsilon):
    """Exactly: over all numbers of right guesses, by their probabilities."""
    right = np.arange(guesses + 1)
    probabilities = stats.binom.pmf(right, guesses, 1 / (1 + math.exp(-epsilon)))
    bounds = np.zeros(guesses + 1)
    for v in right[probabilities > 1e-6]:
        bounds[v] = epsilon_lower_bound(guesses, guesses, int(v), 0.0)
    passed = probabilities[bounds > epsilon].sum()
    assert passed <= 0.05
    assert passed > 0.001  # and it nearly is as often
    if guesses == 500:
        assert (probabilities * bounds).sum() > 0.7 * epsilon


def test_a_mechanism_that_sometimes_tells_all_is_within_its_delta():
    """With probability delta it tells everything, otherwise nothing: it is (0, delta)-private."""
    delta, guesses = 0.04, 50
    assert epsilon_lower_bound(guesses, guesses, guesses, 0.0) > 2.7
    assert guessing_p_value(guesses, guesses, guesses, 0.0, delta) >= delta


def test_numbers_out_of_range():
    for arguments, name in (((5, 6, 1), "guesses"), ((5, 4, 5), "right")):
        with pytest.raises(ArgumentError, match=name):
            guessing_p_value(*arguments, 1.0, 1e-5)
    with pytest.raises(ArgumentError, match="level"):
        epsilon_lower_bound(5, 5, 5, 0.0, 1.0)
