import math

import pytest
from opacus.accountants import create_accountant
from privacy.accountants import independent

from knlightning.checks import ArgumentError
from knlightning.privacy.accounting import epsilon, merged, total_steps


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
@pytest.mark.parametrize(("noise", "rate", "steps"), [(1.0, 0.1, 40), (2.0, 0.5, 10), (0.7, 0.01, 200)])
def test_never_below_the_independent_accountant(accountant, noise, rate, steps):
    ours = epsilon([(noise, rate, steps)], 1e-5, accountant)
    theirs = independent(noise, rate, steps, 1e-5)
    assert ours >= theirs * 0.999
    assert ours <= theirs * (1.02 if accountant == "prv" else 1.35) + 0.02


def test_gdp_understates():
    """Why it is not the default."""
    assert epsilon([(0.8087, 8192 / 1_281_167, 15_639)], 8e-7, "gdp") == pytest.approx(8.0, abs=0.01)
    assert epsilon([(0.8087, 8192 / 1_281_167, 15_639)], 8e-7, "rdp") > 8.4


@pytest.mark.parametrize("accountant", ["rdp", "prv", "gdp"])
def test_nothing_is_spent_before_the_first_step(accountant):
    assert epsilon([], 1e-5, accountant) == 0
    assert epsilon([(1.0, 0.1, 0)], 1e-5, accountant) == 0
    assert epsilon([(0.0, 0.1, 1)], 1e-5, accountant) == math.inf


def test_phases_that_are_alike_become_one():
    assert merged([(1.0, 0.1, 2), (1.0, 0.1, 3), (2.0, 0.1, 1), (1.0, 0.1, 1)]) == [
        (1.0, 0.1, 5),
        (2.0, 0.1, 1),
        (1.0, 0.1, 1),
    ]


def test_gdp_cannot_follow_a_change():
    with pytest.raises(ValueError, match="use prv or rdp"):
        epsilon([(1.0, 0.1, 5), (2.0, 0.1, 1)], 1e-5, "gdp")


def test_an_unknown_accountant():
    with pytest.raises(ArgumentError, match=r"accountant must be one of rdp, prv, gdp, got 'moments'"):
        epsilon([(1.0, 0.1, 5)], 1e-5, "moments")


def test_steps_are_counted():
    assert total_steps([]) == 0
    assert total_steps([(1.0, 0.1, 5), (2.0, 0.1, 2)]) == 7


def test_rdp_is_that_of_opacus():
    """Which computes the divergences of a step anew each time."""
    for history in ([(1.0, 0.1, 40)], [(2.0, 0.5, 10), (0.7, 0.5, 3)]):
        accountant = create_accountant(mechanism="rdp")
        accountant.history = history
        assert epsilon(history, 1e-5, "rdp") == accountant.get_epsilon(delta=1e-5)
