"""Count the epsilon of private steps, or what a budget allows; trains nothing.

knl privacy-budget --sampling_probability 0.01 --num_steps 1000 --epsilon 2
knl privacy-budget --config configs/digits_dp.yaml
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from knlightning.analysis.privacy_budget import costs_of_noise, draw_costs
from knlightning.checks import ArgumentError, check_number
from knlightning.commands.audit_privacy import AuditPrivacyCLI
from knlightning.commands.command import command
from knlightning.commands.output import save_figure, say
from knlightning.privacy import accounting
from knlightning.privacy.accounting import Accountant, Phase
from knlightning.privacy.plan import (
    ENDLESS,
    Budget,
    calibrate_noise,
    count_affordable_steps,
    largest_sampling_probability,
)


class EndAtStart(Callback):
    """Ends a run when its training begins."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End it."""
        trainer.should_stop = True


class PrivacyBudgetCLI(AuditPrivacyCLI):
    """Finds the steps and the noise of the run that a configuration describes; trains nothing, and writes nothing."""

    command = "privacy-budget"
    usage = "--config FILE [--key value ...]"
    own_arguments: ClassVar[tuple[str, ...]] = ()

    def add_own_arguments(self, parser: LightningArgumentParser) -> None:
        """Add none."""

    def check_own_arguments(self) -> None:
        """Let the run end where an audit begins."""
        self.ending = EndAtStart()

    def execute(self) -> None:
        """Begin to train, which ends at once."""
        self.private[0].check = False  # trial steps tell nothing of the budget
        self.private[0].check_before(self.trainer, self.model, self.datamodule)
        self.trainer.fit(self.model, datamodule=self.datamodule)


def privacy_budget(
    noise_multiplier: float | None = None,
    sampling_probability: float | None = None,
    num_steps: int | None = None,
    epsilon: float | None = None,
    delta: float | None = None,
    accountant: Accountant | None = None,
    config: Path | None = None,
    out: Path = Path("privacy_budget.png"),
    overrides: Mapping[str, str] | None = None,
) -> None:
    """Count what private training costs, or what a budget allows; nothing is trained.

    Of noise multiplier, sampling probability, number of steps and epsilon three are given, and the fourth is computed:
    the least noise, the largest probability, the largest number of steps, or the epsilon. With --config instead,
    the steps are those of a private run, and a table and a picture show its epsilon by the noise; any option of knl fit
    with a dot in its name, such as --data.batch_size 512, changes the run.

    Args:
        noise_multiplier: Standard deviation of the noise over the clipping bound, above 0.
        sampling_probability: Probability of each sample to be in a step, above 0 and at most 1: batch size over number
            of training samples.
        num_steps: Number of steps, at least 1.
        epsilon: The budget, above 0.
        delta: Probability with which the guarantee may fail, above 0 and below 1; null for 1e-5, with --config for
            that of the run.
        accountant: One of prv, pld (the same by another library), rdp (looser, as in the paper) or gdp (understates);
            null for prv, with --config for that of the run.
        config: Configuration file of a private run.
        out: The picture, a PNG file; with --config alone.
        overrides: Values of the configuration by dotted names.

    Raises:
        ValueError: If not exactly three of the four are given, or the budget cannot be kept.
    """
    check_number("noise_multiplier", noise_multiplier, above=0, none="what is asked for")
    check_number("sampling_probability", sampling_probability, above=0, at_most=1, none="what is asked for")
    check_number("num_steps", num_steps, at_least=1, integer=True, none="what is asked for")
    check_number("epsilon", epsilon, above=0, none="what is asked for")
    check_number("delta", delta, above=0, below=1, none="1e-5")
    given = {
        "noise_multiplier": noise_multiplier,
        "sampling_probability": sampling_probability,
        "num_steps": num_steps,
        "epsilon": epsilon,
    }
    asked = [name for name, value in given.items() if value is None]
    if config is not None:
        if len(asked) < len(given):
            raise ValueError(f"--{next(n for n in given if n not in asked)}: of --config FILE the run itself says it")
        _of_run(config, out, delta, accountant, overrides or {})
        return
    if overrides:
        raise ValueError(f"--{next(iter(overrides))} is of a configuration: give --config FILE, too")
    if len(asked) != 1:
        raise ValueError(
            f"give three of {', '.join(f'--{name}' for name in given)}, and the fourth is computed; or --config FILE"
        )
    budget = Budget(epsilon, delta or 1e-5, noise_multiplier, accountant or "prv")
    found = _solve(asked[0], given, budget)
    say(f"{asked[0]} {found:.6g}")
    others = ", ".join(f"{name} {value:.6g}" for name, value in given.items() if value is not None)
    say(f"(with {others}; delta {budget.target_delta:g}, accountant {budget.accountant})")


def _solve(asked: str, given: Mapping[str, Any], budget: Budget) -> float:
    """Compute the one of four that is not given."""
    noise, probability, steps = given["noise_multiplier"], given["sampling_probability"], given["num_steps"]
    if asked == "epsilon":
        return accounting.epsilon([Phase(noise, probability, steps)], budget.target_delta, budget.accountant)
    if asked == "noise_multiplier":
        return calibrate_noise(budget, probability, steps)
    if asked == "sampling_probability":
        return largest_sampling_probability(budget, noise, steps)
    if count := count_affordable_steps(budget, noise, probability, ENDLESS):
        return count
    step = accounting.epsilon([Phase(noise, probability, 1)], budget.target_delta, budget.accountant)
    raise ArgumentError("epsilon", budget.target_epsilon, f"at least {step:.4g}, which is what one step costs")


def _of_run(
    config: Path, out: Path, delta: float | None, accountant: Accountant | None, overrides: Mapping[str, str]
) -> None:
    """Print and draw the epsilon of a run by its noise."""
    cli = PrivacyBudgetCLI([f"--config={config}", *(f"--{name}={value}" for name, value in overrides.items())])
    plan, budget = cli.private[0].plan, cli.private[0].budget
    assert plan is not None
    if plan.noise_multiplier == 0:
        raise ValueError("noise_multiplier is 0: epsilon is infinite")
    run = Phase(plan.noise_multiplier, plan.sampling_probability, plan.affordable_steps)
    delta, accountant = delta or budget.accounted_delta, accountant or budget.accountant
    costs = costs_of_noise(run, delta, accountant)
    say(
        f"{run.num_steps} steps ({plan.steps_per_epoch} an epoch) of {plan.batch_size} of {plan.num_samples} samples, a"
        f" sampling probability of {run.sampling_probability:.4g}; epsilon at delta {delta:g} by"
        f" {accountant}\n\n| noise multiplier | epsilon |\n| --- | --- |"
    )
    for cost in costs:
        mark = " (this run)" if cost.noise_multiplier == run.noise_multiplier else ""
        say(f"| {cost.noise_multiplier:.4g}{mark} | {cost.epsilon:.4g} |")
    save_figure(draw_costs(costs, run, delta), out)
    say(f"\nWritten: {out}")


main = partial(command, privacy_budget, "knl privacy-budget")
