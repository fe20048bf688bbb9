"""What all tasks share: an injected backbone, an optimizer and a schedule from the configuration."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from knlightning.nn.normalization import NORM_TYPES
from knlightning.tasks.schedules import RunLR


class Metrics(nn.Module, ABC):
    """What a task counts in an epoch, over all of its batches and devices."""

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """Return the value of each metric by its name, the same on every device."""

    @abstractmethod
    def reset(self) -> None:
        """Begin anew."""


class Task(LightningModule, ABC):
    """Base of the tasks: steps, optimizer, schedule, and what keeps a resumed run true to its configuration.

    A task says what the loss of a batch is, how one is evaluated, and what is counted: it has `train_metrics`,
    `val_metrics` and `test_metrics`, which are logged under `train/`, `val/` and `test/` at the end of an epoch.

    A checkpoint brings back the optimizer and the schedule as they were. What the configuration has changed since
    then (rate, weight decay, length of the schedule, ...) wins over it.

    Args:
        backbone: network, from images (N, C, H, W) in floating point to the output of the task.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the schedule from the optimizer; None keeps the rate constant.
        lr_scheduler_interval: whether the schedule advances with every "epoch" or with every optimizer "step".
        channels_last: keep weights and images in the channels-last memory format, often faster on GPUs.
        norm_weight_decay: weight decay of the parameters of normalization layers (see `parameter_groups`), at least
            0; None for the optimizer's.
        bias_weight_decay: weight decay of the biases, at least 0, other than those of normalization layers that
            norm_weight_decay governs; None for the optimizer's.
        compile: compile the backbone by torch.compile, which takes a while at its first batches; the names of its
            weights stay what they are.

    Raises:
        ValueError: if a weight decay is negative.
    """

    headline: str
    """The metric that the progress bar shows after an evaluation."""
    train_metrics: Metrics
    val_metrics: Metrics
    test_metrics: Metrics

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerCallable,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None,
        lr_scheduler_interval: Literal["epoch", "step"],
        channels_last: bool,
        norm_weight_decay: float | None = None,
        bias_weight_decay: float | None = None,
        compile: bool = False,
    ) -> None:
        for name, decay in (("norm_weight_decay", norm_weight_decay), ("bias_weight_decay", bias_weight_decay)):
            if decay is not None and not 0 <= decay < math.inf:
                raise ValueError(f"model.init_args.{name} must be at least 0, or null for the optimizer's, got {decay}")
        super().__init__()
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.backbone = backbone.to(memory_format=self.memory_format)
        if compile:
            self.backbone.compile()  # in place: torch.compile(backbone) would put _orig_mod. before each name
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.lr_scheduler_interval = lr_scheduler_interval
        self.norm_weight_decay = norm_weight_decay
        self.bias_weight_decay = bias_weight_decay
        self.stop_at_nonfinite = True  # whether a training loss that is not finite ends the run
        self._configured: dict[str, Any] = {}
        self._configured_before: dict[str, Any] = {}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer and its schedule.

        Raises:
            ValueError: if the schedule follows a metric, the optimizer knows no weight decay although one is given
                for norms or biases, or the groups of parameters are not those of the checkpoint.
        """
        apart = self.norm_weight_decay is not None or self.bias_weight_decay is not None
        optimizer = self.make_optimizer(
            parameter_groups(self, self.norm_weight_decay, self.bias_weight_decay) if apart else self.parameters()
        )
        if apart and "weight_decay" not in optimizer.defaults:
            raise ValueError(
                f"model.init_args.optimizer: {type(optimizer).__name__} has no weight decay; set norm_weight_decay and"
                " bias_weight_decay to null, or choose another optimizer"
            )
        scheduler = self.make_lr_scheduler(optimizer) if self.make_lr_scheduler else None
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError(
                "model.init_args.lr_scheduler: ReduceLROnPlateau follows a metric, which a resumed run does not have;"
                " choose a schedule of time such as knlightning.tasks.CosineLR"
            )
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        if self._configured_before.get("sizes", sizes) != sizes:
            raise ValueError(
                "model.init_args.norm_weight_decay and bias_weight_decay part the parameters into groups of"
                f" {sizes} tensors, and the checkpoint's optimizer has {self._configured_before['sizes']}: a run cannot"
                " resume where a weight decay of its own is given or taken away (null); its value may be changed"
            )
        self._configured = {
            "sizes": sizes,
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
            "schedule": copy.deepcopy(scheduler.state_dict()) if scheduler else {},
        }
        if scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": self.lr_scheduler_interval},
        }

    def forward(self, images: Tensor) -> Tensor:
        """Apply the backbone to images (N, C, H, W)."""
        return self.backbone(images.to(memory_format=self.memory_format))

    @abstractmethod
    def training_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of a batch, and count it in `train_metrics`."""

    @abstractmethod
    def evaluate(self, images: Tensor, labels: Tensor, metrics: Any) -> Tensor:
        """Return the logits of a batch, and count it in the metrics of an evaluation."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Compute the loss of a batch.

        Raises:
            FloatingPointError: if the loss is not finite.
        """
        loss = self.training_loss(*batch)
        if self.stop_at_nonfinite and not torch.isfinite(loss):
            raise FloatingPointError(
                f"the training loss is {loss.item()} at epoch {self.current_epoch}, batch {batch_idx} (step"
                f" {self.global_step}). Try a lower learning rate (model.init_args.optimizer.init_args.lr) or"
                " trainer.gradient_clip_val=1; with trainer.precision=16-mixed try bf16-mixed or 32-true; and see that"
                " the images themselves are finite."
            )
        self.log("train/loss_step", loss, prog_bar=True)
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the metrics of the training epoch, before its checkpoint is written.

        What `self.log` sends to the loggers comes after it, and would be lost with a process killed in between.
        """
        values = self._computed("train", self.train_metrics)
        for name, value in values.items():
            self.log(name, value, logger=False, sync_dist=True)  # for the progress bar and the callbacks
        numbers = {name: float(value) for name, value in values.items()}
        for logger in self.loggers:
            logger.log_metrics({**numbers, "epoch": self.current_epoch}, step=self.global_step - 1)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the logits of a batch, for the callbacks."""
        return self.evaluate(*batch, self.val_metrics)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the validation."""
        self._log_evaluation("val", self.val_metrics)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the logits of a batch, for the callbacks."""
        return self.evaluate(*batch, self.test_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test."""
        self._log_evaluation("test", self.test_metrics)

    def _log_evaluation(self, stage: str, metrics: Metrics) -> None:
        for name, value in self._computed(stage, metrics).items():
            # the devices have computed the same: their mean is it, and Lightning is told that they agree
            self.log(name, value, prog_bar=name == f"{stage}/{self.headline}", sync_dist=True)

    def _computed(self, stage: str, metrics: Metrics) -> dict[str, Tensor]:
        values = {f"{stage}/{name}": value for name, value in metrics.compute().items()}
        metrics.reset()
        return values

    def check_width(self, logits: Tensor) -> None:
        """Compare the network with the data; met by the first batch, before any step of the optimizer.

        Args:
            logits: (N, classes, ...).

        Raises:
            ValueError: if the number of classes is not that of the datamodule.
        """
        classes = getattr(self.trainer.datamodule, "num_classes", None)  # type: ignore[attr-defined]
        if classes is not None and logits.shape[1] != classes:
            raise ValueError(
                f"the network has {logits.shape[1]} outputs and the data {classes} classes: set"
                f" model.init_args.backbone.init_args.num_classes to {classes}"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what the optimizer and the schedule were configured with."""
        checkpoint["configured"] = self._configured

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Recall what the optimizer and the schedule of the checkpoint were configured with."""
        self._configured_before = checkpoint.get("configured", {})

    def on_train_start(self) -> None:
        """Give the schedule its length, and apply what the configuration of a resumed run has changed, that alone.

        Raises:
            ValueError: if the schedule needs the length of a run that has none.
        """
        self._set_length()
        before, self._configured_before = self._configured_before, {}
        if not before or before == self._configured:
            return
        optimizer = self.trainer.optimizers[0]
        for group, old, new in zip(optimizer.param_groups, before["groups"], self._configured["groups"], strict=True):
            rate = new["lr"]
            if self.trainer.lr_scheduler_configs:  # the present rate keeps its place in the schedule
                rate = group["lr"] * _ratio(_initial_rate(new), _initial_rate(old))
            group.update({key: value for key, value in new.items() if key not in old or old[key] != value})
            group["lr"] = rate
        for config in self.trainer.lr_scheduler_configs:
            scheduler, old, new = config.scheduler, before["schedule"], self._configured["schedule"]
            vars(scheduler).update(
                {key: new[key] for key in new if key in old and old[key] != new[key] and not key.startswith("_")}
            )
            if isinstance(scheduler, RunLR):  # its rate is a function of time alone
                for group, rate in zip(optimizer.param_groups, scheduler.get_lr(), strict=True):
                    group["lr"] = rate

    def _set_length(self) -> None:
        """Give a schedule that lasts as long as the run its length.

        Not sooner than when training starts: to count the steps of a run, Lightning makes the training loader, and one
        made before a checkpoint is restored would not go on where the checkpoint was written.
        """
        schedule = self._configured["schedule"]
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, RunLR) and schedule["total"] is None:
                config.scheduler.total = schedule["total"] = self._run_length()

    def _run_length(self) -> int:
        """Return the length of the run in units of the schedule's interval."""
        by_epoch = self.lr_scheduler_interval == "epoch"
        length = self.trainer.max_epochs if by_epoch else self.trainer.estimated_stepping_batches
        if length is None or length < 1 or math.isinf(length):
            raise ValueError(
                "the schedule lasts as long as the run, and this run has no end in units of"
                f" lr_scheduler_interval={self.lr_scheduler_interval!r}: set trainer.max_epochs, or give the length as"
                " model.init_args.lr_scheduler.init_args.total"
            )
        return int(length)


def parameter_groups(
    module: nn.Module, norm_weight_decay: float | None, bias_weight_decay: float | None
) -> list[dict[str, Any]]:
    """Group the parameters of a module by their weight decay.

    Normalization layers are those of :data:`knlightning.nn.normalization.NORM_TYPES`, and every other module with
    "Norm" in the name of its class, as torch, torchvision and timm call theirs. Biases are the parameters whose name
    ends in "bias".

    Args:
        module: Module with parameters to train.
        norm_weight_decay: Weight decay of the parameters of normalization layers; None for the optimizer's.
        bias_weight_decay: Weight decay of the remaining biases; None for the optimizer's.

    Returns:
        Groups for an optimizer, without empty ones: the parameters that keep the optimizer's decay, those of the
        norms, the biases; each in the module's order.
    """
    norms: set[Parameter] = set()
    biases: set[Parameter] = set()
    if norm_weight_decay is not None:
        layers = (m for m in module.modules() if isinstance(m, NORM_TYPES) or "Norm" in type(m).__name__)
        norms = {parameter for layer in layers for parameter in layer.parameters(recurse=False)}
    if bias_weight_decay is not None:
        biases = {parameter for name, parameter in module.named_parameters() if name.endswith("bias")} - norms
    every = list(module.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in every if p not in norms and p not in biases]},
        {"params": [p for p in every if p in norms], "weight_decay": norm_weight_decay},
        {"params": [p for p in every if p in biases], "weight_decay": bias_weight_decay},
    ]
    return [group for group in groups if group["params"]]


def _initial_rate(group: dict[str, Any]) -> float:
    return float(group.get("initial_lr", group["lr"]))


def _ratio(new: float, old: float) -> float:
    return new / old if old else 1.0
