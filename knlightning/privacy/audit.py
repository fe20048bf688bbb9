"""Hold a private run to its promises, with its own network, data and settings (`knl audit-privacy`).

Before any training it is checked, on real batches of the run,

- that removing a sample changes the sum of gradients by no more than the clipping bound, through the whole pipeline of
  the run, whatever the samples share (`knlightning.privacy.removal`);
- that a step leaves nothing of its samples in what checkpoints hold;
- that random masks and augmentation follow from the secret key;
- that the noise added to a step is Gaussian with the stated scale, new at each step, and random to its last bits;
- that the samples of a step are drawn by Poisson sampling at the stated rate;
- that epsilon is not below what an independent accountant computes (dp-accounting, with privacy loss distributions).

With canaries the run is then trained, and attacked: what the attack can tell is a lower bound on epsilon.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from knlightning.checks import check_number
from knlightning.privacy.accounting import Phase, epsilon, epsilon_by_pld
from knlightning.privacy.callback import DifferentialPrivacy
from knlightning.privacy.canaries import Canaries
from knlightning.privacy.loader import PrivateLoader
from knlightning.privacy.removal import remove_samples

LEVEL = 1e-6
"""Probability with which a statistical check fails although all is well."""
ATTACK_LEVEL = 1e-3
"""The same for the attack; more than that cannot be told where delta is not tiny."""
SIGMAS = 5.0
"""The same for means, in standard deviations."""
MIN_NOISE_VALUES = 200_000
"""Number of values of the noise that are looked at, at least."""
MAX_NOISE_STEPS = 1000
"""Number of steps whose noise is looked at, at most."""


@dataclass(frozen=True)
class Finding:
    """What a check has found.

    Args:
        name: What was checked.
        passed: Whether it is as it should be.
        text: What was found, in numbers.
    """

    name: str
    passed: bool
    text: str


class PrivacyAudit(Callback):
    """Check a private run when its training begins, and end it there; stands after its DifferentialPrivacy.

    Args:
        samples: Number of samples that are removed, one after the other; at least 1.
        canaries: Number of canaries, for a lower bound on epsilon; at least 0. With any, the run is trained to its end,
            with canaries in the places of so many training samples (`knlightning.privacy.canaries`).

    Attributes:
        findings: What the checks have found.

    Raises:
        ArgumentError: If samples or canaries is out of its range.
        ValueError: If dp-accounting is not installed.
    """

    def __init__(self, samples: int = 8, canaries: int = 0) -> None:
        check_number("samples", samples, at_least=1, integer=True)
        check_number("canaries", canaries, at_least=0, integer=True)
        epsilon_by_pld([], 0.5, 1.0)  # it would be missed only after all other checks
        self.samples, self.num_canaries = samples, canaries
        self.findings: list[Finding] = []
        self._undo = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the checks; stop, if there are no canaries to train with."""
        privacy = _private_callback(trainer)
        self.findings = [
            *check_contributions(trainer, pl_module, privacy, self.samples),
            *check_noise(trainer, privacy),
            *check_sampling(privacy.loader),
            check_epsilon(privacy),
        ]
        if self.num_canaries:
            self.canaries = Canaries(self.num_canaries, privacy)
            self._undo.enter_context(self.canaries.inserted())
        else:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the canaries tell what they can."""
        if self.num_canaries:
            self.findings.append(check_canaries(_private_callback(trainer), self.canaries))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the run as it was."""
        self._undo.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the run as it was."""
        self._undo.close()


def _private_callback(trainer: Trainer) -> DifferentialPrivacy:
    return next(c for c in trainer.callbacks if isinstance(c, DifferentialPrivacy))  # type: ignore[attr-defined]


def check_contributions(
    trainer: Trainer, task: LightningModule, privacy: DifferentialPrivacy, samples: int
) -> list[Finding]:
    """Remove samples of real batches, one after the other, and compare the sums of the clipped gradients.

    Args:
        trainer: In `fit`, at the start of training.
        task: The task that is trained.
        privacy: The callback, after its `on_train_start`.
        samples: Number of samples to remove.
    """
    changes, excesses, moves, empty, stored, public = remove_samples(trainer, task, privacy, samples)
    bound = privacy.sums.sensitivity
    clipped = sum(change > 0.999 * bound for change in changes)
    return [
        Finding(
            "a sample changes a step by no more than the bound",
            bool(changes) and max(excesses) <= 1,
            f"removing one of {len(changes)} samples changed the sum by up to {max(changes, default=math.nan):.6g}, the"
            f" bound is {bound:.6g} ({clipped} of them reach it)",
        ),
        Finding(
            "a sample changes no other sample",
            max(moves, default=math.inf) <= 1,
            f"the norms of the others' gradients moved by {max(moves, default=math.nan):.2g} of what rounding explains",
        ),
        Finding("a step without samples is empty", empty == 0.0, f"norm {empty:g} of the sum of no samples"),
        Finding("a step stores nothing of its samples", not stored, stored or "nothing changed but the gradients"),
        Finding(
            "masks and augmentation are secret",
            not public,
            f"random numbers {public or 'change with the secret key alone, or there are none'}",
        ),
    ]


def check_noise(trainer: Trainer, privacy: DifferentialPrivacy) -> list[Finding]:
    """Take steps without samples, and look at what the optimizer would get as their gradient.

    Args:
        trainer: In `fit`, at the start of training.
        privacy: The callback, after its `on_train_start`.
    """
    from scipy import stats  # here: slow to import

    plan = privacy.plan
    assert plan is not None
    if plan.noise_multiplier == 0:
        return [Finding("noise of the stated scale", False, "noise_multiplier 0: nothing is private")]
    steps: list[Tensor] = []
    for step in range(MAX_NOISE_STEPS):
        gradient = privacy.noisy_gradient(trainer, -1 - step)  # numbers of steps that the run will not use
        steps.append(gradient.double() * plan.batch_size)
        if step and (step + 1) * len(steps[0]) >= MIN_NOISE_VALUES:
            break
    noise = torch.cat(steps)
    values = noise / (plan.noise_multiplier * privacy.sums.sensitivity)
    coarse = max(_share_of_float32(noise), _share_of_float32(values))
    stated, deviation = plan.noise_multiplier, float(values.std())
    tolerance = SIGMAS / math.sqrt(2 * len(values))
    fit = float(stats.kstest(values[:1_000_000].cpu().numpy(), "norm").pvalue)
    correlation = float(torch.corrcoef(torch.stack(steps[:2]))[0, 1])
    return [
        Finding(
            "noise of the stated scale",
            abs(deviation - 1) < tolerance and abs(float(values.mean())) < SIGMAS / math.sqrt(len(values)),
            f"standard deviation {deviation * stated:.5g} of {len(values):,} values, stated {stated:.5g}"
            f" (+- {tolerance * stated:.2g})",
        ),
        Finding("noise is Gaussian", fit > LEVEL, f"Kolmogorov-Smirnov test: p = {fit:.2g}"),
        Finding(
            "noise is new at each step",
            abs(correlation) < SIGMAS / math.sqrt(len(steps[0])),
            f"correlation of two steps {correlation:.2g}",
        ),
        Finding(
            "noise is random to the last bit",
            coarse < 0.01,
            f"{coarse:.2%} of the values have no more than float32's 24 bits, and leave the low bits of a sum bare",
        ),
    ]


def _share_of_float32(values: Tensor) -> float:
    """Return the share of float64 values that are, up to the rounding of a product, values of float32."""
    off = (values - values.float().double()).abs()
    return float((off <= 2.0**-45 * values.abs()).double().mean())


def check_sampling(loader: PrivateLoader, num_steps: int = 200) -> list[Finding]:
    """Draw the samples of steps, without reading them.

    Args:
        loader: The training loader.
        num_steps: Number of steps to draw.
    """
    from scipy import stats

    if not loader.poisson_sampling:
        return [Finding("Poisson sampling", False, "poisson_sampling is false: epsilon is nominal")]
    num_samples, probability = loader.num_samples, loader.sampling_probability
    sizes, times = [], torch.zeros(num_samples, dtype=torch.long)
    for step in range(num_steps):
        drawn = loader.draw(-1 - step)
        sizes.append(len(drawn))
        times[drawn] += 1
    expected = num_steps * num_samples * probability
    spread = math.sqrt(expected * (1 - probability))
    off = (sum(sizes) - expected) / spread if spread else float(sum(sizes) != expected)
    variance = probability * (1 - probability)
    p_sizes = _dispersion(torch.tensor(sizes, dtype=torch.float64), num_samples * variance, stats)
    p_samples = _dispersion(times.double(), num_steps * variance, stats)
    return [
        Finding(
            "Poisson sampling at the stated rate",
            abs(off) < SIGMAS and min(p_sizes, p_samples) > LEVEL,
            f"{sum(sizes) / num_steps / num_samples:.5g} over {num_steps} steps, stated {probability:.5g}; spread of"
            f" the sizes p = {p_sizes:.2g}, of how often a sample was drawn p = {p_samples:.2g}",
        )
    ]


def check_epsilon(privacy: DifferentialPrivacy) -> Finding:
    """Compare the epsilon of the whole run with that of an independent accountant.

    Args:
        privacy: The callback, after its `on_train_start`.
    """
    plan, budget, delta = privacy.plan, privacy.budget, privacy.budget.accounted_delta
    assert plan is not None
    run = Phase(plan.noise_multiplier, plan.sampling_probability, plan.affordable_steps)
    ours = epsilon([run], delta, budget.accountant)
    if budget.accountant == "pld":  # which is dp-accounting's
        other, theirs = "Opacus (prv)", epsilon([run], delta, "prv")
    else:
        other, theirs = "dp-accounting", epsilon_by_pld([run], delta, min(1e-3, ours / 10_000))
    return Finding(
        "epsilon is not understated",
        ours >= 0.99 * theirs,
        f"{ours:.4g} by {budget.accountant} after all of {run.num_steps} steps, {theirs:.4g} by {other}, at delta"
        f" {delta:g}",
    )


def check_canaries(privacy: DifferentialPrivacy, canaries: Canaries) -> Finding:
    """Compare epsilon with what an attack on the run could tell.

    Args:
        privacy: The callback, at the end of the training.
        canaries: Those of the training.
    """
    claimed, delta = privacy.ledger.epsilon, privacy.budget.target_delta
    attack = canaries.attack(claimed, delta)
    return Finding(
        "no attack tells more than epsilon allows",
        attack.p_value > ATTACK_LEVEL,
        f"epsilon is at least {attack.bound:.4g} with 95 % confidence, for {attack.right} of {attack.guesses} guesses"
        f" about {len(canaries.scores)} canaries are right; {claimed:.4g} is claimed, at delta {delta:g}",
    )


def _dispersion(counts: Tensor, variance: float, stats: Any) -> float:
    """Return the two-sided p-value of the spread of counts that should have a variance."""
    if variance == 0 or len(counts) < 2:
        return 1.0
    statistic = float((counts - counts.mean()).square().sum()) / variance
    below = float(stats.chi2.cdf(statistic, len(counts) - 1))
    return 2 * min(below, 1 - below)
