import math

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant

from knlightning.privacy import DifferentialPrivacy
from knlightning.privacy.accounting import affordable_steps, epsilon, merged, noise_for

TABLE_4 = {"samples": 1_281_167, "batch": 8192, "epoch_steps": 156, "steps": 15_600}


def independent(noise, rate, steps, delta):
    """Epsilon by another library, with privacy loss distributions."""
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    event = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise))
    accountant.compose(dp_event.SelfComposedDpEvent(event, steps))
    return accountant.get_epsilon(delta)


@pytest.mark.slow
@pytest.mark.parametrize(("accountant", "published"), [("rdp", 0.853), ("prv", 0.827)])
def test_the_noise_of_table_4(accountant, published):
    privacy = DifferentialPrivacy(8.0, 7.8e-7, max_grad_norm=2.0, accountant=accountant)
    plan = privacy.plan_for(**TABLE_4)
    assert plan.noise == pytest.approx(published, rel=0.01)
    assert plan.last_step == 15_600
    # the independent accountant is the tightest: what it says of the noise is no more than was asked for
    spent = independent(plan.noise, plan.rate, plan.steps, 7.8e-7)
    assert spent <= 8.0 * 1.001
    assert spent == pytest.approx(8.0, rel=0.01 if accountant == "prv" else 0.08)


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


@pytest.mark.parametrize("accountant", ["rdp", "prv", "gdp"])
def test_the_noise_spends_the_budget_and_no_more(accountant):
    noise = noise_for(2.0, 1e-5, 0.1, 50, accountant)
    assert 2.0 * 0.999 <= epsilon([(noise, 0.1, 50)], 1e-5, accountant) <= 2.0
    assert epsilon([(noise * 0.99, 0.1, 50)], 1e-5, accountant) > 2.0


def test_what_was_spent_before_counts():
    spent = [(1.0, 0.1, 30)]
    noise = noise_for(6.0, 1e-5, 0.1, 50, "rdp", spent)
    assert noise > noise_for(6.0, 1e-5, 0.1, 50, "rdp")
    assert 6.0 * 0.999 <= epsilon([*spent, (noise, 0.1, 50)], 1e-5, "rdp") <= 6.0
    with pytest.raises(ValueError, match=r"cannot be reached .* 4\.\d+ is spent already"):
        noise_for(3.0, 1e-5, 0.1, 50, "rdp", spent)


def test_how_long_a_budget_lasts():
    steps = affordable_steps(3.0, 1e-5, 1.0, 0.1, 1000, "rdp", [(2.0, 0.1, 7)])
    assert epsilon([(2.0, 0.1, 7), (1.0, 0.1, steps)], 1e-5, "rdp") <= 3.0
    assert epsilon([(2.0, 0.1, 7), (1.0, 0.1, steps + 1)], 1e-5, "rdp") > 3.0
    assert affordable_steps(3.0, 1e-5, 1.0, 0.1, 5, "rdp", []) == 5
    assert affordable_steps(0.1, 1e-5, 0.5, 0.5, 5, "rdp", []) == 0


def test_a_target_beyond_reach():
    with pytest.raises(ValueError, match=r"target_epsilon 1e-05 cannot be reached .* Raise the target"):
        noise_for(1e-5, 1e-9, 1.0, 10, "rdp")


def test_rows_that_are_alike_become_one():
    assert merged([(1.0, 0.1, 2), (1.0, 0.1, 3), (2.0, 0.1, 1), (1.0, 0.1, 1)]) == [
        (1.0, 0.1, 5),
        (2.0, 0.1, 1),
        (1.0, 0.1, 1),
    ]


def test_gdp_cannot_follow_a_change():
    with pytest.raises(ValueError, match="use prv or rdp"):
        epsilon([(1.0, 0.1, 5), (2.0, 0.1, 1)], 1e-5, "gdp")


def test_an_unknown_accountant():
    with pytest.raises(ValueError, match=r"rdp, prv, gdp, got 'moments'"):
        epsilon([(1.0, 0.1, 5)], 1e-5, "moments")
