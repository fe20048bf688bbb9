import math
import sys
import time

import pytest
from opacus.accountants import create_accountant
from opacus.accountants.analysis.prv import compose
from privacy.accountants import independent

from knlightning.checks import ArgumentError
from knlightning.privacy import accounting
from knlightning.privacy.accounting import RDP_ORDERS, epsilon, merged, total_steps


@pytest.mark.parametrize("accountant", ["rdp", "prv", "pld"])
@pytest.mark.parametrize(("noise", "rate", "steps"), [(1.0, 0.1, 40), (2.0, 0.5, 10), (0.7, 0.01, 200)])
def test_never_below_the_independent_accountant(accountant, noise, rate, steps):
    ours = epsilon([(noise, rate, steps)], 1e-5, accountant)
    theirs = independent(noise, rate, steps, 1e-5)
    assert ours >= theirs * 0.999
    assert ours <= theirs * (1.35 if accountant == "rdp" else 1.02) + 0.02


def test_gdp_understates():
    """Why it is not the default."""
    assert epsilon([(0.8087, 8192 / 1_281_167, 15_639)], 8e-7, "gdp") == pytest.approx(8.0, abs=0.01)
    assert epsilon([(0.8087, 8192 / 1_281_167, 15_639)], 8e-7, "rdp") > 8.4


@pytest.mark.parametrize("accountant", ["rdp", "prv", "pld", "gdp"])
def test_nothing_is_spent_before_the_first_step(accountant):
    assert epsilon([], 1e-5, accountant) == 0
    assert epsilon([(1.0, 0.1, 0)], 1e-5, accountant) == 0
    assert epsilon([(0.0, 0.1, 1)], 1e-5, accountant) == math.inf


def test_phases_that_are_alike_become_one():
    assert merged([(1.0, 0.1, 2), (1.0, 0.1, 3), (2.0, 0.1, 1), (1.0, 0.1, 1)]) == [
        (1.0, 0.1, 6),
        (2.0, 0.1, 1),
    ]


def test_gdp_cannot_follow_a_change():
    with pytest.raises(ValueError, match="use prv, pld or rdp"):
        epsilon([(1.0, 0.1, 5), (2.0, 0.1, 1)], 1e-5, "gdp")


def test_an_unknown_accountant():
    with pytest.raises(ArgumentError, match=r"accountant must be one of rdp, prv, pld, gdp, got 'moments'"):
        epsilon([(1.0, 0.1, 5)], 1e-5, "moments")


def test_steps_are_counted():
    assert total_steps([]) == 0
    assert total_steps([(1.0, 0.1, 5), (2.0, 0.1, 2)]) == 7


def test_rdp_is_that_of_opacus():
    """Which computes the divergences of a step anew each time."""
    for history in ([(1.0, 0.1, 40)], [(2.0, 0.5, 10), (0.7, 0.5, 3)]):
        accountant = create_accountant(mechanism="rdp")
        accountant.history = history
        assert epsilon(history, 1e-5, "rdp") == accountant.get_epsilon(delta=1e-5, alphas=RDP_ORDERS)


@pytest.mark.parametrize(("accountant", "within"), [("rdp", 1.3), ("prv", 1.03), ("pld", 1.01)])
def test_small_epsilons_are_as_tight_as_large_ones(accountant, within):
    """Neither orders of RDP that end at 63 nor an error of 0.01 allow that."""
    theirs = independent(66.0, 0.05, 40, 1e-5, interval=1e-6)
    assert theirs < 0.02
    assert theirs * 0.99 <= epsilon([(66.0, 0.05, 40)], 1e-5, accountant) <= theirs * within


@pytest.mark.parametrize("accountant", ["prv", "pld"])
@pytest.mark.parametrize(("noise", "rate", "steps"), [(0.3, 0.2, 600), (0.05, 0.5, 100_000), (1e-3, 0.5, 10)])
def test_large_epsilons_are_finite_and_soon_known(accountant, noise, rate, steps):
    history, before = [(noise, rate, steps)], time.process_time()
    assert epsilon(history, 1e-5, accountant) == epsilon(history, 1e-5, "rdp") < math.inf
    assert time.process_time() - before < 5


def test_the_grid_of_prv_stays_small(monkeypatch):
    """Its number of points grows with the number of steps; then the error does, and at last it is not asked."""
    monkeypatch.setattr(accounting, "PRV_POINTS", 1024)
    assert epsilon([(1.0, 0.01, 500)], 1e-5, "prv") == epsilon([(1.0, 0.01, 500)], 1e-5, "rdp")


def test_pld_without_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ValueError, match=r"pip install 'knlightning\[privacy\]'"):
        epsilon([(1.0, 0.1, 5)], 1e-5, "pld")


def test_all_epochs_of_a_run_have_one_plan_of_fourier_transforms(monkeypatch):
    """A plan for each number of steps would stay in memory, megabytes for every epoch."""
    sizes = []
    original = compose.rfft
    monkeypatch.setattr(compose, "rfft", lambda pmf: sizes.append(len(pmf)) or original(pmf))
    for epoch in range(1, 8):
        epsilon([(1.03, 0.05, 20 * epoch)], 1e-4, "prv")
    assert len(set(sizes)) <= 3
    assert all(size.bit_count() == 1 for size in sizes)
