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
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from knlightning.privacy.accounting import epsilon
from knlightning.privacy.callback import DifferentialPrivacy
from knlightning.privacy.loader import PrivateLoader

LEVEL = 1e-6
"""Probability with which a statistical check fails although all is well."""
SIGMAS = 5.0
"""The same for means, in standard deviations."""
LEAST_VALUES = 200_000
"""Values of the noise that are looked at, at least."""
MOST_STEPS = 1000


@dataclass(frozen=True)
class Finding:
    """What a check has found.

    Args:
        name: what was checked.
        passed: whether it is as it should be.
        text: what was found, in numbers.
    """

    name: str
    passed: bool
    text: str


class PrivacyAudit(Callback):
    """Check a private run when its training begins, and end it there; stands after its DifferentialPrivacy.

    Args:
        samples: how many samples are left out, one after the other.

    Attributes:
        findings: what the checks have found.

    Raises:
        ValueError: if samples is below 1, or dp-accounting is not installed.
    """

    def __init__(self, samples: int = 8) -> None:
        if samples < 1:
            raise ValueError(f"--samples must be at least 1, got {samples}")
        _independent_accountant()  # it would be missed only after all other checks
        self.samples = samples
        self.findings: list[Finding] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the checks, and stop."""
        privacy = next(c for c in trainer.callbacks if isinstance(c, DifferentialPrivacy))  # type: ignore[attr-defined]
        loader = cast(PrivateLoader, trainer.fit_loop._data_source.instance)
        pl_module.log = _silent  # type: ignore[method-assign] # no results are being collected yet
        self.findings = [
            *check_contributions(trainer, pl_module, privacy, loader, self.samples),
            *check_noise(trainer, privacy),
            *check_sampling(privacy, loader),
            check_epsilon(privacy),
        ]
        trainer.should_stop = True


def check_contributions(
    trainer: Trainer, task: LightningModule, privacy: DifferentialPrivacy, loader: PrivateLoader, samples: int
) -> list[Finding]:
    """Leave samples of real batches out, one after the other, and compare the sums of the clipped gradients.

    A sample is left out by making its images infinite: such a sample contributes nothing, and leaves the shape of the
    batch, and so all random numbers of the others, as they are.
    """
    bound, rest = privacy.max_grad_norm, 0.0
    norms: list[float] = []
    for batch in loader:
        count = len(_images(batch)) // privacy.views
        whole = _sum_of(trainer, task, privacy, batch)
        for sample in range(min(count, samples - len(norms))):
            difference = whole - _sum_of(trainer, task, privacy, batch, without=sample)
            norms.append(float(difference.norm()))
        if count:
            nobody = _sum_of(trainer, task, privacy, batch, without=slice(None))
            rest = max(rest, float(nobody.norm()))
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
    """Take steps without samples, and look at what stands in the place of the gradient."""
    from scipy import stats  # here: slow to import

    plan = privacy.plan
    assert plan is not None
    if plan.noise == 0:
        return [Finding("noise of the stated scale", False, "noise_multiplier 0: nothing is private")]
    steps: list[Tensor] = []
    for step in range(MOST_STEPS):
        drawn = privacy.noisy_gradient(trainer, -1 - step)  # numbers of steps that the run will not use
        steps.append(torch.cat([part.flatten() for part in drawn]).double() * plan.batch)
        if step and (step + 1) * len(steps[0]) >= LEAST_VALUES:
            break
    values = torch.cat(steps) / (plan.noise * privacy.max_grad_norm)
    deviation = float(values.std())
    tolerance = SIGMAS / math.sqrt(2 * len(values))
    fit = float(stats.kstest(values[:1_000_000].cpu().numpy(), "norm").pvalue)
    alike = float(torch.corrcoef(torch.stack(steps[:2]))[0, 1])
    return [
        Finding(
            "noise of the stated scale",
            abs(deviation - 1) < tolerance and abs(float(values.mean())) < SIGMAS / math.sqrt(len(values)),
            f"standard deviation {deviation * plan.noise:.5g} of {len(values):,} values, stated {plan.noise:.5g}"
            f" (+- {tolerance * plan.noise:.2g})",
        ),
        Finding("noise is Gaussian", fit > LEVEL, f"Kolmogorov-Smirnov test: p = {fit:.2g}"),
        Finding(
            "noise is new at each step",
            abs(alike) < SIGMAS / math.sqrt(len(steps[0])),
            f"correlation of two steps {alike:.2g}",
        ),
    ]


def check_sampling(privacy: DifferentialPrivacy, loader: PrivateLoader, steps: int = 200) -> list[Finding]:
    """Draw the samples of steps, without reading them."""
    from scipy import stats

    if not loader.poisson:
        return [Finding("Poisson sampling", False, "poisson_sampling is false: epsilon is nominal")]
    sizes, times = [], torch.zeros(loader.samples, dtype=torch.long)
    for step in range(steps):
        chosen = loader.random.chosen(loader.samples, loader.rate, -1 - step)
        sizes.append(len(chosen))
        times[chosen] += 1
    expected = steps * loader.samples * loader.rate
    spread = math.sqrt(expected * (1 - loader.rate))
    off = (sum(sizes) - expected) / spread if spread else float(sum(sizes) != expected)
    variance = loader.samples * loader.rate * (1 - loader.rate)
    p_sizes = _dispersion(torch.tensor(sizes, dtype=torch.float64), variance, stats)
    p_samples = _dispersion(times.double(), steps * loader.rate * (1 - loader.rate), stats)
    return [
        Finding(
            "Poisson sampling at the stated rate",
            abs(off) < SIGMAS and min(p_sizes, p_samples) > LEVEL,
            f"{sum(sizes) / steps / loader.samples:.5g} over {steps} steps, stated {loader.rate:.5g}; spread of the"
            f" sizes p = {p_sizes:.2g}, of how often a sample was drawn p = {p_samples:.2g}",
        )
    ]


def check_epsilon(privacy: DifferentialPrivacy) -> Finding:
    """Compare the epsilon of the whole run with that of an independent accountant."""
    dp_event, PLDAccountant = _independent_accountant()  # noqa: N806 # a class
    plan = privacy.plan
    assert plan is not None
    ours = epsilon([(plan.noise, plan.rate, plan.last_step)], privacy.target_delta, privacy.accountant)
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    step = dp_event.PoissonSampledDpEvent(plan.rate, dp_event.GaussianDpEvent(plan.noise))
    accountant.compose(dp_event.SelfComposedDpEvent(step, plan.last_step))
    theirs = accountant.get_epsilon(privacy.target_delta)
    return Finding(
        "epsilon is not understated",
        ours >= 0.99 * theirs,
        f"{ours:.4g} by {privacy.accountant} after all of {plan.last_step} steps, {theirs:.4g} by dp-accounting, at"
        f" delta {privacy.target_delta:g}",
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


def _images(batch: Any) -> Tensor:
    return next(part for part in tree_leaves(batch) if isinstance(part, Tensor))


def _sum_of(
    trainer: Trainer,
    task: LightningModule,
    privacy: DifferentialPrivacy,
    batch: Any,
    without: int | slice | None = None,
) -> Tensor:
    """Run a batch as the training does, and return the sum of its clipped gradients."""
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        batch = trainer.precision_plugin.convert_input(batch)
        batch = task._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        if without is not None:
            images, views = _images(batch), privacy.views
            spoilt = images.clone()
            rows = slice(without * views, (without + 1) * views) if isinstance(without, int) else without
            spoilt[rows] = math.inf
            batch = tree_map_only(Tensor, lambda part: spoilt if part is images else part, batch)
        with trainer.precision_plugin.train_step_context():
            result: Any = task.training_step(batch, 0)
        loss = result["loss"] if isinstance(result, dict) else result
        (loss / trainer.accumulate_grad_batches).backward()
        privacy.on_after_backward(trainer, task)
    return privacy.taken_sums().double()
