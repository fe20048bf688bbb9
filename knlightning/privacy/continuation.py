"""What a private run goes on from (a checkpoint, a network trained before, reports beside them), and its plan."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from knlightning.internals.lightning import num_steps_left
from knlightning.privacy.ledger import REPORT, Ledger, read_report, read_segments
from knlightning.privacy.loader import PrivateLoader
from knlightning.privacy.plan import Budget, Plan, make_plan
from knlightning.run_directory import NOT_PRIVATE, run_of

print_once = rank_zero_only(print)


def take_up_history(ledger: Ledger, trainer: Trainer, task: LightningModule, directory: Path) -> None:
    """Count everything that was spent on the way to the weights a run begins with, and say what is not in them.

    That is the history in the checkpoint, that of earlier runs of the same network object, and what the reports beside
    the checkpoint tell of: later checkpoints, and other runs in the same directory. Histories are put together step by
    step; nothing that one of them holds is lost by another.

    Args:
        ledger: Of the run; has read the checkpoint, and begun a start.
        trainer: At the start of its training.
        task: The task that is trained.
        directory: Where the run reports.

    Raises:
        ValueError: If the weights were trained without counting it.
    """
    if added := ledger.share(task):
        _say(f"the network was trained privately before: its {added} steps count too. A new network starts at 0")
    counted = bool(ledger.restored) if trainer.ckpt_path else bool(ledger.segments)
    if trainer.global_step and not counted:
        raise ValueError(
            "the checkpoint was trained without differential privacy, or without counting it: nothing bounds what"
            " it tells of the training samples. Start a new run"
        )
    if not ledger.restored:
        if _read(directory):
            _say(f"{directory / REPORT} tells of another run, which this one does not count; it is kept there")
        return
    directories = [directory, Path(trainer.default_root_dir).absolute()]
    if trainer.ckpt_path:
        checkpoint = Path(trainer.ckpt_path).absolute()
        directories.append(run_of(checkpoint) or checkpoint.parent)
    found = [_recall(ledger, path) for path in dict.fromkeys(directories)]
    if not any(found):
        _say(
            f"there is no {REPORT} in {' or '.join(map(str, dict.fromkeys(directories)))}. What the checkpoint itself"
            " has spent counts; steps of later checkpoints, if there were any, cannot"
        )


def plan_run(budget: Budget, ledger: Ledger, trainer: Trainer, loader: PrivateLoader) -> Plan:
    """Settle the steps of a run, and their noise.

    Args:
        budget: What must be kept.
        ledger: What was spent before.
        trainer: At the start of training.
        loader: The training loader.

    Returns:
        The plan.

    Raises:
        ValueError: If the budget cannot be kept, or an epoch does not have whole steps.
    """
    batches = int(trainer.num_training_batches)
    if batches % loader.micro_batches:
        raise ValueError(
            f"the trainer's limit_train_batches leaves {batches} batches in an epoch, which are no whole steps of"
            f" {loader.micro_batches}: give the number of steps instead"
        )
    taken = trainer.global_step
    num_steps = taken + num_steps_left(trainer)
    before = ledger.restored["plan"]["noise_multiplier"] if ledger.restored else None
    plan = make_plan(
        budget,
        num_samples=loader.num_samples,
        batch_size=loader.batch_size,
        steps_per_epoch=batches // loader.micro_batches,
        num_steps=num_steps,
        steps_taken=taken,
        spent=ledger.history,
        noise_before=before,
    )
    if before is not None and budget.noise_multiplier is None and plan.noise_multiplier != before:
        _say(f"the noise changes from {before:.4g} to {plan.noise_multiplier:.4g} for the steps to come")
    return plan


def _recall(ledger: Ledger, directory: Path) -> bool:
    """Count what the report in a directory tells of; say whether there is one."""
    report = _read(directory, ". What the checkpoint itself has spent counts; steps of later checkpoints cannot")
    if not report:
        return report is not None
    if added := ledger.add(read_segments(report)):
        _say(f"{directory / REPORT} tells of {added} steps that are not in the checkpoint: they count too")
    if NOT_PRIVATE in report:
        _say(f"{directory / REPORT}: {report[NOT_PRIVATE]}")
    return True


def _read(directory: Path, more: str = "") -> dict[str, Any] | None:
    """Read the report in a directory; empty, with a message, if it is damaged."""
    try:
        return read_report(directory)
    except ValueError as error:
        _say(f"{error}{more}")
        return {}


def _say(message: str) -> None:
    print_once(f"Privacy: {message}.", flush=True)
