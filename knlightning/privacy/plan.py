"""What a private run will do: how many steps, of how many samples, with how much noise.

Pure functions of plain numbers. A run, a command or a notebook can ask them before anything is trained.
"""

import math
from dataclasses import dataclass
from typing import get_args

from knlightning.checks import ArgumentError, check_choice, check_number
from knlightning.privacy.accounting import Accountant, History, Phase, epsilon

TOLERANCE = 1e-3
"""How far below the budget the epsilon of calibrated noise may lie, as a fraction of the budget."""
LARGEST_NOISE = 1e6
"""The largest noise multiplier that calibration tries."""
SMALLEST_PROBABILITY = 1e-9
"""The smallest sampling probability that is tried."""
ENDLESS = 10**9
"""Number of steps that stands for a run without an end."""
CUT_SHARE = 1e-3
"""Share of delta that is kept for steps being cut, where they have a largest size."""


@dataclass(frozen=True)
class Budget:
    """The privacy that a run must keep, or the noise that it is given.

    Args:
        target_epsilon: The epsilon not to be exceeded, above 0; None for no limit.
        target_delta: Probability with which the guarantee may fail, above 0 and below 1.
        noise_multiplier: Standard deviation of the noise over the clipping bound, at least 0; None to calibrate it for
            target_epsilon. At 0 nothing is private, which no target_epsilon allows.
        accountant: How epsilon is computed; see `knlightning.privacy.accounting.epsilon`.
        cut: Whether steps are cut at a largest size, see `count_cut_micro_batches`.

    Raises:
        ArgumentError: If an argument is out of its range.
        ValueError: If there is neither a target nor noise.
    """

    target_epsilon: float | None
    target_delta: float
    noise_multiplier: float | None = None
    accountant: Accountant = "prv"
    cut: bool = False

    @property
    def accounted_delta(self) -> float:
        """The delta of the accountants: what is left of target_delta for steps that are not cut."""
        return self.target_delta * (1.0 - CUT_SHARE) if self.cut else self.target_delta

    def __post_init__(self) -> None:
        check_number("target_epsilon", self.target_epsilon, above=0, none="no limit, with noise_multiplier")
        check_number("target_delta", self.target_delta, above=0, below=1)
        check_number("noise_multiplier", self.noise_multiplier, at_least=0, none="what target_epsilon needs")
        check_choice("accountant", self.accountant, get_args(Accountant))
        if self.target_epsilon is None and self.noise_multiplier is None:
            raise ValueError("target_epsilon or noise_multiplier is needed: the privacy to keep, or the noise")
        if self.target_epsilon is not None and self.noise_multiplier == 0:
            hint = "Without noise epsilon is infinite; leave target_epsilon out to train without privacy"
            raise ArgumentError("noise_multiplier", self.noise_multiplier, "above 0 with a target_epsilon", hint)


@dataclass(frozen=True)
class Plan:
    """The steps of a private run.

    Args:
        num_samples: Number of training samples.
        batch_size: Number of samples in a step, on average over the steps.
        sampling_probability: Probability of each sample to be in a step.
        steps_per_epoch: Number of steps in an epoch.
        num_steps: Number of steps of the whole run.
        noise_multiplier: Standard deviation of the noise over the clipping bound.
        affordable_steps: Number of steps after which the budget is spent; num_steps if it lasts.
    """

    num_samples: int
    batch_size: int
    sampling_probability: float
    steps_per_epoch: int
    num_steps: int
    noise_multiplier: float
    affordable_steps: int


def make_plan(
    budget: Budget,
    *,
    num_samples: int,
    batch_size: int,
    steps_per_epoch: int,
    num_steps: int | float,
    steps_taken: int = 0,
    spent: History = (),
    noise_before: float | None = None,
) -> Plan:
    """Calibrate the noise of a run for its budget, or count for how many steps the budget lasts.

    Args:
        budget: What must be kept.
        num_samples: Number of training samples.
        batch_size: Number of samples in a step.
        steps_per_epoch: Number of steps in an epoch.
        num_steps: Number of steps of the whole run; infinite for a run without an end.
        steps_taken: Number of steps taken before.
        spent: What they have cost, together with steps that will be taken again.
        noise_before: Noise multiplier of the run so far. It is kept if it is what the budget needs.

    Returns:
        The plan.

    Raises:
        ValueError: If the budget cannot be kept, or its noise depends on an end that the run does not have.
    """
    check_sampling(num_samples, batch_size, budget.target_delta)
    sampling_probability = batch_size / num_samples
    noise = budget.noise_multiplier
    if math.isinf(num_steps):
        if noise is None:
            raise ValueError(
                "the noise for target_epsilon depends on the number of steps, and this run has no end: set the"
                " trainer's max_epochs or max_steps, or noise_multiplier"
            )
        num_steps = ENDLESS
    num_steps = affordable = int(num_steps)
    steps_left = num_steps - steps_taken
    if noise is None:
        noise = calibrate_noise(budget, sampling_probability, steps_left, spent, noise_before)
    elif budget.target_epsilon is not None:
        affordable = steps_taken + count_affordable_steps(budget, noise, sampling_probability, steps_left, spent)
        if affordable == steps_taken and steps_left > 0:
            past = epsilon(spent, budget.accounted_delta, budget.accountant)
            raise ValueError(
                f"target_epsilon {budget.target_epsilon:g} does not pay for another step with noise_multiplier"
                f" {noise:g}, {past:.4g} is spent: raise one of them"
            )
    return Plan(num_samples, batch_size, sampling_probability, steps_per_epoch, num_steps, noise, affordable)


def check_sampling(num_samples: int, batch_size: int, target_delta: float) -> None:
    """Check that a step and delta fit the number of training samples.

    Args:
        num_samples: Number of training samples.
        batch_size: Number of samples in a step.
        target_delta: Probability with which the guarantee may fail.

    Raises:
        ValueError: If a step has more samples than there are, or delta is 1 / num_samples or more.
    """
    if batch_size > num_samples:
        raise ValueError(
            f"a step of {batch_size} samples (batch_size x devices x the trainer's accumulate_grad_batches) is more"
            f" than the {num_samples} training samples: lower batch_size"
        )
    if target_delta >= 1 / num_samples:
        raise ValueError(
            f"target_delta {target_delta:g} must be below 1 / {num_samples} = {1 / num_samples:.2g}, the number of"
            " training samples: with a larger one, publishing a sample at random would count as private"
        )


def count_steps_per_epoch(num_samples: int, batch_size: int, poisson_sampling: bool) -> int:
    """Count the steps in which each sample comes once, on average with Poisson sampling, at most once without."""
    return max(1, round(num_samples / batch_size)) if poisson_sampling else num_samples // batch_size


def count_micro_batches(batch_size: int, views: int, physical_batch_size: int, world_size: int) -> int:
    """Count the micro-batches of a step on each device.

    Args:
        batch_size: Number of samples in a step.
        views: Number of images that show each sample.
        physical_batch_size: Number of images that go through the network at once on each device, on average.
        world_size: Number of devices.

    Returns:
        The least number with which no micro-batch is larger on average.
    """
    return math.ceil(batch_size * views / (physical_batch_size * world_size))


def count_cut_micro_batches(
    num_samples: int, batch_size: int, views: int, max_physical_batch_size: int, world_size: int, target_delta: float
) -> int:
    """Count the micro-batches of a step of which none may be larger than a bound.

    Poisson samples have no largest size. A step of more than micro_batches x world_size x (max_physical_batch_size //
    views) samples is cut, to as many of them at random. There are so many micro-batches that this hardly ever happens:
    in a step with a probability of at most `CUT_SHARE` x target_delta / `ENDLESS`, whoever takes part. This is what has
    to be added to delta for each step; `docs/privacy.md` has the proof. Source: the truncated Poisson batches of Chua
    et al., Scalable DP-SGD: Shuffling vs. Poisson subsampling (NeurIPS 2024).

    Args:
        num_samples: Number of training samples.
        batch_size: Number of samples in a step, on average.
        views: Number of images that show each sample.
        max_physical_batch_size: Largest number of images that go through the network at once on each device.
        world_size: Number of devices.
        target_delta: Probability with which the guarantee may fail.

    Returns:
        The least number with which that holds.

    Raises:
        ArgumentError: If there is no place for the views of a single sample.
    """
    from scipy import stats  # here: slow to import

    fitting = max_physical_batch_size // views
    if not fitting:
        hint = "The views of a sample go through the network together"
        raise ArgumentError(
            "max_physical_batch_size", max_physical_batch_size, f"at least views, which is {views}", hint
        )
    count, allowed = math.ceil(batch_size / (fitting * world_size)), CUT_SHARE * target_delta / ENDLESS
    # as many of the others as fill it, so that one more sample is too many
    while stats.binom.sf(count * world_size * fitting - 1, num_samples - 1, batch_size / num_samples) > allowed:
        count += 1
    return count


def calibrate_noise(
    budget: Budget,
    sampling_probability: float,
    num_steps: int,
    spent: History = (),
    guess: float | None = None,
) -> float:
    """Find the least noise with which a number of steps stays within a budget.

    Args:
        budget: What must be kept; its target_epsilon is given.
        sampling_probability: Probability of each sample to be in a step.
        num_steps: Number of steps that will be taken.
        spent: Steps that were taken before, and count too.
        guess: Is returned if it is good enough.

    Returns:
        The noise multiplier. Epsilon ends between the budget and a thousandth of it below.

    Raises:
        ValueError: If no noise up to `LARGEST_NOISE` is enough.
    """
    target, delta, accountant = budget.target_epsilon, budget.accounted_delta, budget.accountant
    assert target is not None

    def epsilon_with(noise_multiplier: float) -> float:
        return epsilon([*spent, Phase(noise_multiplier, sampling_probability, num_steps)], delta, accountant)

    if guess and (1 - TOLERANCE) * target <= epsilon_with(guess) <= target:
        return guess
    low, high = 0.0, 1.0
    while (reached := epsilon_with(high)) > target:
        low, high = high, 2 * high
        if high > LARGEST_NOISE:
            past = epsilon(spent, delta, accountant)
            floor = reached if accountant == "rdp" and not past else 0.0
            raise ValueError(
                f"target_epsilon {target:g} cannot be reached with target_delta {delta:g}, {num_steps} steps and a"
                f" sampling probability of {sampling_probability:.3g}, by accountant {accountant} and noise up to"
                f" {LARGEST_NOISE:g}"
                + (f": {past:.3g} is spent already" if past else "")
                + ". Raise the target, or take fewer steps or smaller batches"
                + (f"; or use accountant prv or pld: rdp tells of no epsilon below {floor:.2g}" if floor else "")
            )
    while target - reached > TOLERANCE * target and high - low > 1e-6 * high:
        middle = (low + high) / 2
        if (found := epsilon_with(middle)) > target:
            low = middle
        else:
            high, reached = middle, found
    return high


def count_affordable_steps(
    budget: Budget, noise_multiplier: float, sampling_probability: float, num_steps: int, spent: History = ()
) -> int:
    """Count how many of a number of steps a budget pays for.

    Args:
        budget: What must be kept; its target_epsilon is given.
        noise_multiplier: Standard deviation of the noise over the clipping bound.
        sampling_probability: Probability of each sample to be in a step.
        num_steps: Number of steps that are wanted.
        spent: Steps that were taken before, and count too.

    Returns:
        A number between 0 and num_steps.
    """
    target = budget.target_epsilon
    assert target is not None

    def affordable(count: int) -> bool:
        history = [*spent, Phase(noise_multiplier, sampling_probability, count)]
        return epsilon(history, budget.accounted_delta, budget.accountant) <= target

    low, high = 0, 1
    while high < num_steps and affordable(high):
        low, high = high, min(2 * high, num_steps)
    if high == num_steps and affordable(num_steps):
        return num_steps
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if affordable(middle) else (low, middle)
    return low


def largest_sampling_probability(budget: Budget, noise_multiplier: float, num_steps: int) -> float:
    """Find the largest sampling probability with which a number of steps stays within a budget.

    Args:
        budget: What must be kept; its target_epsilon is given.
        noise_multiplier: Standard deviation of the noise over the clipping bound, above 0.
        num_steps: Number of steps.

    Returns:
        A number above 0, at most 1; rounded down, to a thousandth of itself.

    Raises:
        ValueError: If even one sample in a billion is too many.
    """
    target = budget.target_epsilon
    assert target is not None

    def affordable(probability: float) -> bool:
        return (
            epsilon([Phase(noise_multiplier, probability, num_steps)], budget.accounted_delta, budget.accountant)
            <= target
        )

    if affordable(1.0):
        return 1.0
    low, high = SMALLEST_PROBABILITY, 1.0
    if not affordable(low):
        raise ValueError(
            f"target_epsilon {target:g} pays for {num_steps} steps with noise_multiplier {noise_multiplier:g} at no"
            " sampling probability: raise the noise or the target, or take fewer steps"
        )
    while high / low > 1 + TOLERANCE:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if affordable(middle) else (low, middle)
    return low
