"""What private training cannot be combined with, found by looking at a run before it reads any data."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    SpikeDetection,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from knlightning.internals.torch import is_compiled
from knlightning.nn.normalization import PRIVATE_NORMS, mixes_samples
from knlightning.privacy.rules import check_rules

PRECISIONS = ("32-true", "64-true", "bf16-mixed")
"""In all of these the norms of gradients are float32 or better."""


def check_run(trainer: Trainer, task: LightningModule) -> None:
    """Refuse tasks and trainers that take or show something of the samples beside the noisy gradient.

    Args:
        trainer: Before `fit`.
        task: The task to train.

    Raises:
        ValueError: If there is such a thing; the message says why, and what to do.
    """
    for reason in _task_reasons(task) + _trainer_reasons(trainer):
        raise ValueError(f"differential privacy: {reason}")


def check_data(data: Any) -> None:
    """Refuse data that show a sample several times in a step, or draw it by what class it has.

    Args:
        data: The datamodule, or None.

    Raises:
        ValueError: If they do.
    """
    if getattr(getattr(data, "sampling", None), "repeats", 1) > 1:
        raise ValueError(
            "differential privacy: repeated augmentation shows a sample several times in a step, each time with the"
            " full bound: set the datamodule's repeated_augmentation to 1, and views of DifferentialPrivacy to more"
        )
    if getattr(data, "balanced_sampling", False):
        raise ValueError(
            "differential privacy: every sample is drawn with the same probability, which balanced_sampling of the"
            " datamodule is not: set it to false; class_weights of the task can take its place"
        )


def _task_reasons(task: LightningModule) -> list[str]:
    reasons = []
    for name, layer in task.named_modules():
        kind = f"{name or 'the task'} ({type(layer).__name__})"
        if mixes_samples(layer):
            reasons.append(
                f"{kind} mixes the samples of a batch, or keeps statistics of them without noise: no network with it is"
                f" private. Use norm {', '.join(PRIVATE_NORMS)} in the backbone; for a trained network,"
                " torchvision.ops.FrozenBatchNorm2d in its place, or knlightning.models.kernel_normalize"
            )
        if is_compiled(layer):
            reasons.append(f"{kind} is compiled, which hides its layers: set the task's compile to false")
    reasons += check_rules(task)
    if getattr(task, "mixing", None) is not None:
        reasons.append("mixup and cutmix put two samples into one: set the task's mixup_alpha and cutmix_alpha to 0")
    if getattr(task, "loss_mean", None) == "batch":
        reasons.append(
            'loss_mean="batch" divides the loss by the labelled pixels of all images of a batch, so that each image'
            ' changes the share of the others: set the task\'s loss_mean to "image"'
        )
    if not task.automatic_optimization:
        reasons.append("automatic_optimization=False: its steps cannot be counted")
    return reasons


def _trainer_reasons(trainer: Any) -> list[str]:
    reasons = []
    if trainer.gradient_clip_val is not None:
        reasons.append(
            "the trainer's gradient_clip_val clips the noisy sum: leave it out; max_grad_norm bounds each sample"
        )
    if trainer.precision_plugin.precision not in PRECISIONS:
        reasons.append(
            f"the trainer's precision {trainer.precision_plugin.precision} is too coarse, or drops steps: use one of"
            f" {', '.join(PRECISIONS)}"
        )
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        reasons.append(f"the trainer's strategy {type(trainer.strategy).__name__}: use one device, or ddp")
    if trainer.overfit_batches:
        reasons.append("the trainer's overfit_batches takes batches that are not drawn at random: set it to 0")
    if trainer.reload_dataloaders_every_n_epochs:
        reasons.append(
            "the trainer's reload_dataloaders_every_n_epochs: the training samples must stay the same: set it to 0"
        )
    for callback in trainer.callbacks:
        name = type(callback).__name__
        if isinstance(callback, (BatchSizeFinder, LearningRateFinder)):
            reasons.append(f"{name} takes steps that are not counted: find the value on data that need no privacy")
        if isinstance(callback, GradientAccumulationScheduler):
            reasons.append(f"{name} changes the size of a step: set one batch_size for all of the run")
        if isinstance(callback, SpikeDetection):
            reasons.append(f"{name} ends the run by its training loss: leave it out")
        if isinstance(callback, StochasticWeightAveraging):
            reasons.append(f"{name} takes steps of its own: use knlightning.callbacks.EMA")
    return reasons
