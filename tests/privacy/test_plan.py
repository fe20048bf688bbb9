import math

import numpy as np
import pytest
from privacy.accountants import independent
from scipy import stats

from knlightning.checks import ArgumentError
from knlightning.privacy.accounting import epsilon
from knlightning.privacy.plan import (
    Budget,
    calibrate_noise,
    check_sampling,
    count_affordable_steps,
    count_cut_micro_batches,
    count_micro_batches,
    count_steps_per_epoch,
    largest_sampling_probability,
    make_plan,
)

TABLE_4 = {"num_samples": 1_281_167, "batch_size": 8192, "steps_per_epoch": 156, "num_steps": 15_600}
SMALL = {"num_samples": 100, "batch_size": 10, "steps_per_epoch": 10, "num_steps": 50}


@pytest.mark.slow
@pytest.mark.parametrize(("accountant", "published"), [("rdp", 0.853), ("prv", 0.827)])
def test_the_noise_of_table_4(accountant, published):
    plan = make_plan(Budget(8.0, 7.8e-7, accountant=accountant), **TABLE_4)
    assert plan.noise_multiplier == pytest.approx(published, rel=0.01)
    assert plan.affordable_steps == 15_600
    # the independent accountant is the tightest: what it says of the noise is no more than was asked for
    spent = independent(plan.noise_multiplier, plan.sampling_probability, plan.num_steps, 7.8e-7)
    assert spent <= 8.0 * 1.001
    assert spent == pytest.approx(8.0, rel=0.01 if accountant == "prv" else 0.08)


def test_noise_is_calibrated_or_kept():
    budget = Budget(2.0, 1e-3, accountant="rdp")
    plan = make_plan(budget, **SMALL)
    assert plan.noise_multiplier == calibrate_noise(budget, 0.1, 50)
    assert (plan.sampling_probability, plan.num_steps, plan.affordable_steps) == (0.1, 50, 50)
    enough = plan.noise_multiplier * 1.0001  # a bit more than was found
    assert make_plan(budget, **SMALL, noise_before=enough).noise_multiplier == enough
    for before in (plan.noise_multiplier * 0.99, plan.noise_multiplier * 1.01):
        assert make_plan(budget, **SMALL, noise_before=before).noise_multiplier == plan.noise_multiplier


def test_given_noise_lasts_for_a_number_of_steps():
    budget = Budget(2.0, 1e-3, 1.0, "rdp")
    plan = make_plan(budget, **SMALL)
    assert plan.noise_multiplier == 1.0
    assert plan.affordable_steps == count_affordable_steps(budget, 1.0, 0.1, 50) < 50
    later = make_plan(budget, **SMALL, steps_taken=3, spent=[(1.0, 0.1, 3)])
    assert later.affordable_steps == plan.affordable_steps
    with pytest.raises(ValueError, match=r"does not pay for another step with noise_multiplier 1, .* is spent"):
        make_plan(budget, **SMALL, steps_taken=plan.affordable_steps, spent=[(1.0, 0.1, plan.affordable_steps)])
    assert make_plan(Budget(None, 1e-3, 1.0), **SMALL).affordable_steps == 50


def test_a_run_without_an_end():
    endless = SMALL | {"num_steps": math.inf}
    plan = make_plan(Budget(2.0, 1e-3, 1.0, "rdp"), **endless)
    assert plan.affordable_steps == make_plan(Budget(2.0, 1e-3, 1.0, "rdp"), **SMALL).affordable_steps
    with pytest.raises(ValueError, match=r"this run has no end: set the trainer's max_epochs"):
        make_plan(Budget(2.0, 1e-3, None, "rdp"), **endless)


@pytest.mark.parametrize("accountant", ["rdp", "prv", "gdp"])
def test_the_noise_spends_the_budget_and_no_more(accountant):
    noise = calibrate_noise(Budget(2.0, 1e-5, accountant=accountant), 0.1, 50)
    assert 2.0 * 0.999 <= epsilon([(noise, 0.1, 50)], 1e-5, accountant) <= 2.0
    assert epsilon([(noise * 0.99, 0.1, 50)], 1e-5, accountant) > 2.0


def test_what_was_spent_before_counts():
    spent = [(1.0, 0.1, 30)]
    noise = calibrate_noise(Budget(6.0, 1e-5, accountant="rdp"), 0.1, 50, spent)
    assert noise > calibrate_noise(Budget(6.0, 1e-5, accountant="rdp"), 0.1, 50)
    assert 6.0 * 0.999 <= epsilon([*spent, (noise, 0.1, 50)], 1e-5, "rdp") <= 6.0
    with pytest.raises(ValueError, match=r"cannot be reached .* 4\.\d+ is spent already"):
        calibrate_noise(Budget(3.0, 1e-5, accountant="rdp"), 0.1, 50, spent)


def test_how_long_a_budget_lasts():
    budget = Budget(3.0, 1e-5, accountant="rdp")
    steps = count_affordable_steps(budget, 1.0, 0.1, 1000, [(2.0, 0.1, 7)])
    assert epsilon([(2.0, 0.1, 7), (1.0, 0.1, steps)], 1e-5, "rdp") <= 3.0
    assert epsilon([(2.0, 0.1, 7), (1.0, 0.1, steps + 1)], 1e-5, "rdp") > 3.0
    assert count_affordable_steps(budget, 1.0, 0.1, 5) == 5
    assert count_affordable_steps(Budget(0.1, 1e-5, accountant="rdp"), 0.5, 0.5, 5) == 0


def test_a_target_beyond_reach():
    said = (
        r"1e-05 cannot be reached .* by accountant rdp and noise up to 1e\+06\. Raise the target.* use accountant prv"
    )
    with pytest.raises(ValueError, match=said):
        calibrate_noise(Budget(1e-5, 1e-9, accountant="rdp"), 1.0, 10)


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_small_targets_get_no_more_noise_than_they_need(accountant):
    noise = calibrate_noise(Budget(0.02, 1e-5, accountant=accountant), 0.05, 40)
    spent, with_less = (independent(n, 0.05, 40, 1e-5, interval=1e-6) for n in (noise, noise * 0.8))
    assert spent <= 0.02 < with_less


def test_the_largest_sampling_probability():
    budget = Budget(2.0, 1e-5, accountant="rdp")
    found = largest_sampling_probability(budget, 1.0, 100)
    assert epsilon([(1.0, found, 100)], 1e-5, "rdp") <= 2.0 < epsilon([(1.0, found * 1.002, 100)], 1e-5, "rdp")
    assert largest_sampling_probability(budget, 100.0, 100) == 1.0
    with pytest.raises(ValueError, match=r"pays for 100 steps with noise_multiplier 0\.01 at no sampling probability"):
        largest_sampling_probability(budget, 0.01, 100)


def test_steps_and_delta_that_do_not_fit_the_samples():
    check_sampling(20, 20, 0.04)
    with pytest.raises(ValueError, match=r"a step of 32 samples .* more than the 20 training samples"):
        check_sampling(20, 32, 1e-5)
    with pytest.raises(ValueError, match=r"target_delta 0.05 must be below 1 / 20"):
        check_sampling(20, 5, 0.05)


def test_steps_and_micro_batches():
    assert [count_steps_per_epoch(20, batch, True) for batch in (5, 6, 20)] == [4, 3, 1]
    assert [count_steps_per_epoch(20, batch, False) for batch in (5, 6, 20)] == [4, 3, 1]
    assert count_steps_per_epoch(20, 12, True) == 2
    assert count_steps_per_epoch(20, 12, False) == 1
    assert count_micro_batches(64, 2, 16, 4) == 2
    assert count_micro_batches(65, 2, 16, 4) == 3


def test_steps_that_are_cut_hardly_ever_are():
    """Two micro-batches of 80 hold 60 samples on average, and 13 standard deviations more."""
    count = count_cut_micro_batches(10_000, 60, 1, 80, 1, 1e-5)
    assert count == 2
    assert stats.binom.sf(79, 9_999, 0.006) > 1e-17 > stats.binom.sf(159, 9_999, 0.006)
    assert count_cut_micro_batches(10_000, 60, 1, 16, 2, 1e-5) == 5
    assert count_cut_micro_batches(10_000, 60, 4, 64, 2, 1e-5) == 5
    assert count_cut_micro_batches(20, 20, 1, 20, 1, 1e-3) == 1  # there are no more
    with pytest.raises(ArgumentError, match="max_physical_batch_size must be at least views, which is 4, got 3"):
        count_cut_micro_batches(20, 20, 4, 3, 1, 1e-3)


def excess(probability, epsilon, noise):
    """Integrate how much more a mixture with a shifted Gaussian says than the other, both ways: the least delta."""
    x = np.linspace(-12 * noise, 12 * noise + 1, 200_001)
    without = stats.norm.pdf(x, 0, noise)
    with_it = (1 - probability) * without + probability * stats.norm.pdf(x, 1, noise)
    step = x[1] - x[0]
    ways = (with_it, without), (without, with_it)
    return max(float(np.maximum(one - np.exp(epsilon) * two, 0).sum() * step) for one, two in ways)


@pytest.mark.parametrize("epsilon", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("q", [0.1, 0.5])
def test_what_a_step_that_may_be_cut_costs(q, epsilon):
    """Two samples, of which a step takes one at most: exactly, and as it is accounted for.

    The other one is seen. If it does not take part, the sample does with probability q, or has pushed it out.
    """
    other_stays_out = 1 - q + q * q / 2
    takes_part = ((1 - q) * q + q * q / 2) / other_stays_out
    exactly = other_stays_out * excess(takes_part, epsilon, 0.6)
    uncut = excess(q, epsilon, 0.6)
    cut = stats.binom.sf(0, 1, q)  # as many of the others as fill a step
    assert other_stays_out * uncut < exactly <= uncut + cut
    assert takes_part > q  # more than Poisson sampling


def test_what_is_kept_of_delta_for_steps_that_are_cut():
    cut, whole = (Budget(2.0, 1e-3, accountant="rdp", cut=cut) for cut in (True, False))
    assert cut.accounted_delta == pytest.approx(0.999e-3)
    assert whole.accounted_delta == 1e-3
    noise, without = calibrate_noise(cut, 0.1, 50), calibrate_noise(whole, 0.1, 50)
    assert epsilon([(noise, 0.1, 50)], 0.999e-3, "rdp") <= 2.0
    assert noise >= without


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"target_epsilon": 0.0}, "target_epsilon must be a number above 0, or null for no limit"),
        ({"target_epsilon": math.inf}, "target_epsilon must be a number above 0"),
        ({"target_delta": 1.0}, "target_delta must be a number above 0 and below 1"),
        ({"noise_multiplier": -1.0}, "noise_multiplier must be a number at least 0, or null for what target_epsilon"),
        ({"noise_multiplier": 0.0}, "noise_multiplier must be above 0 with a target_epsilon, got 0.0"),
        ({"accountant": "moments"}, "accountant must be one of rdp, prv, pld, gdp"),
    ],
)
def test_budgets_out_of_range(argument, message):
    with pytest.raises(ArgumentError, match=message):
        Budget(**({"target_epsilon": 1.0, "target_delta": 1e-5} | argument))
    with pytest.raises(ValueError, match="target_epsilon or noise_multiplier is needed"):
        Budget(None, 1e-5)
