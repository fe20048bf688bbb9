"""Hold a private run to its promises, with its own network, data and settings (`knl audit-privacy`).

Before any training it is checked, on real batches of the run,

- that replacing a sample by one that contributes nothing changes the sum of gradients by no more than the clipping
  bound (neighbouring data sets change one step by no more than that), whatever else the samples share;
- that the noise added to a step is Gaussian with the stated scale, and new at each step;
- that the samples of a step are drawn by Poisson sampling at the stated rate;
- that epsilon is not below what an independent accountant computes (dp-accounting, with privacy loss distributions).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from knlightning.checks import check_number
from knlightning.internals.lightning import prepared_batch
from knlightning.privacy.accounting import Phase, epsilon
from knlightning.privacy.batches import images_of, loss_of, map_tensors
from knlightning.privacy.callback import DifferentialPrivacy
from knlightning.privacy.loader import PrivateLoader

LEVEL = 1e-6
"""Probability with which a statistical check fails although all is well."""
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
        samples: Number of samples that are left out, one after the other; at least 1.

    Attributes:
        findings: What the checks have found.

    Raises:
        ArgumentError: If samples is out of its range.
        ValueError: If dp-accounting is not installed.
    """

    def __init__(self, samples: int = 8) -> None:
        check_number("samples", samples, at_least=1, integer=True)
        _independent_accountant()  # it would be missed only after all other checks
        self.samples = samples
        self.findings: list[Finding] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the checks, and stop."""
        privacy = next(c for c in trainer.callbacks if isinstance(c, DifferentialPrivacy))  # type: ignore[attr-defined]
        pl_module.log = _silent  # type: ignore[method-assign] # no results are being collected yet
        self.findings = [
            *check_contributions(trainer, pl_module, privacy, self.samples),
            *check_noise(trainer, privacy),
            *check_sampling(privacy.loader),
            check_epsilon(privacy),
        ]
        trainer.should_stop = True


def check_contributions(
    trainer: Trainer, task: LightningModule, privacy: DifferentialPrivacy, samples: int
) -> list[Finding]:
    """Leave samples of real batches out, one after the other, and compare the sums of the clipped gradients.

    A sample is left out by making its images infinite: such a sample contributes nothing, and leaves the shape of the
    batch, and so all random numbers of the others, as they are.

    Args:
        trainer: In `fit`, at the start of training.
        task: The task that is trained.
        privacy: The callback, after its `on_train_start`.
        samples: Number of samples to leave out.
    """
    bound, rest = privacy.max_grad_norm, 0.0
    norms: list[float] = []
    for batch in privacy.loader:
        num_samples = len(images_of(batch)) // privacy.views
        whole = _clipped_sum(trainer, task, privacy, batch)
        for sample in range(min(num_samples, samples - len(norms))):
            difference = whole - _clipped_sum(trainer, task, privacy, batch, without=sample)
            norms.append(float(difference.norm()))
        if num_samples:
            empty = _clipped_sum(trainer, task, privacy, batch, without=slice(None))
            rest = max(rest, float(empty.norm()))
        if len(norms) >= samples:
            break
    clipped = sum(norm > 0.999 * bound for norm in norms)
    return [
        Finding(
            "a sample changes a step by no more than the bound",
            bool(norms) and max(norms) <= bound * (1 + 1e-4),
            f"leaving out one of {len(norms)} samples changed the sum by up to {max(norms, default=math.nan):.6g}, the"
            f" bound is {bound:g} ({clipped} of them reach it)",
        ),
        Finding("a step without samples is empty", rest == 0.0, f"norm {rest:g} of the sum of no samples"),
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
    values = torch.cat(steps) / (plan.noise_multiplier * privacy.max_grad_norm)
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
    ]


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
    dp_event, PLDAccountant = _independent_accountant()  # noqa: N806 # a class
    plan, budget = privacy.plan, privacy.budget
    assert plan is not None
    run = Phase(plan.noise_multiplier, plan.sampling_probability, plan.affordable_steps)
    ours = epsilon([run], budget.target_delta, budget.accountant)
    if budget.accountant == "pld":  # which is dp-accounting's
        other, theirs = "Opacus (prv)", epsilon([run], budget.target_delta, "prv")
    else:
        accountant = PLDAccountant(value_discretization_interval=min(1e-3, ours / 10_000))
        step = dp_event.PoissonSampledDpEvent(run.sampling_probability, dp_event.GaussianDpEvent(run.noise_multiplier))
        accountant.compose(dp_event.SelfComposedDpEvent(step, run.num_steps))
        other, theirs = "dp-accounting", accountant.get_epsilon(budget.target_delta)
    return Finding(
        "epsilon is not understated",
        ours >= 0.99 * theirs,
        f"{ours:.4g} by {budget.accountant} after all of {run.num_steps} steps, {theirs:.4g} by {other}, at delta"
        f" {budget.target_delta:g}",
    )


def _independent_accountant() -> tuple[Any, Any]:
    try:
        from dp_accounting import dp_event
        from dp_accounting.pld import PLDAccountant
    except ImportError:
        raise ValueError(
            "audit-privacy compares epsilon with another accountant's: pip install 'knlightning[privacy]'"
        ) from None
    return dp_event, PLDAccountant


def _dispersion(counts: Tensor, variance: float, stats: Any) -> float:
    """Return the two-sided p-value of the spread of counts that should have a variance."""
    if variance == 0 or len(counts) < 2:
        return 1.0
    statistic = float((counts - counts.mean()).square().sum()) / variance
    below = float(stats.chi2.cdf(statistic, len(counts) - 1))
    return 2 * min(below, 1 - below)


def _silent(*args: Any, **kwargs: Any) -> None:
    pass


def _clipped_sum(
    trainer: Trainer,
    task: LightningModule,
    privacy: DifferentialPrivacy,
    batch: Any,
    without: int | slice | None = None,
) -> Tensor:
    """Run a batch as the training does, and return the sum of its clipped gradients.

    Args:
        trainer: In `fit`.
        task: The task that is trained.
        privacy: The callback.
        batch: As the training loader gives it.
        without: A sample, or rows, to leave out.
    """
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        batch = prepared_batch(trainer, task, batch)
        if without is not None:
            images, views = images_of(batch), privacy.views
            rows = slice(without * views, (without + 1) * views) if isinstance(without, int) else without
            infinite = images.clone()
            infinite[rows] = math.inf
            batch = map_tensors(batch, lambda part: infinite if part is images else part)
        with trainer.precision_plugin.train_step_context():
            loss = loss_of(task.training_step(batch, 0))
        (loss / trainer.accumulate_grad_batches).backward()
        privacy.on_after_backward(trainer, task)
    return privacy.sums.pop().double()
