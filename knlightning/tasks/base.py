"""What all tasks share: the backbone, the optimizer and the schedule, which they are given."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from knlightning.checkpoint_files import read_checkpoint, stored_config
from knlightning.checks import check, check_choice, check_number
from knlightning.internals.lightning import is_accumulating, is_epoch_over, is_resuming, rewind_unfinished_epoch
from knlightning.internals.torch import found_too_small
from knlightning.models.weights import load_weights
from knlightning.protocols import KeepsLedger, data_of, has_batch_norm
from knlightning.run_directory import mark_not_private, report_directory
from knlightning.tasks.deferred import DeferredChecks, check_finite
from knlightning.tasks.fine_tuning import Freezing, do_weights_follow, weights_follow
from knlightning.tasks.metrics import Metrics
from knlightning.tasks.optimizer_settings import check_layers, check_settings, make_grouped
from knlightning.tasks.resuming import Stored, apply_to_callbacks, compare_optimizers, configuration, start, take_from
from knlightning.tasks.stored import make_arguments


class Task(LightningModule, ABC):
    """Base of the tasks: steps, optimizer and schedule, and how the configuration of a resumed run takes effect.

    A task defines the loss of a batch and how a batch is evaluated. It has `train_metrics`, `val_metrics` and
    `test_metrics`, which are logged under `train/`, `val/` and `test/` at the end of an epoch.

    A checkpoint restores the optimizer and the schedule. What the configuration has changed since then (learning rate,
    weight decay, length of the schedule, ...) takes precedence over it.

    Args:
        backbone: Network, from images (N, C, H, W) in floating point to the output of the task.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the schedule from the optimizer; None for a constant learning rate.
        lr_scheduler_interval: Whether the schedule advances with every "epoch" or with every optimizer "step".
        channels_last: Whether weights and images have the channels-last memory format, which is the faster one.
        norm_weight_decay: Weight decay of normalization layers, at least 0; None for the optimizer's.
        bias_weight_decay: Weight decay of the biases, at least 0; None for the optimizer's. If norm_weight_decay is
            given, it applies to the biases of normalization layers instead.
        compile: Whether the backbone is compiled by torch.compile; the names of the weights stay the same.
        init_from: File of weights to begin with, or the name of published ones, as in
            `knlightning.models.load_weights`; None for the weights that the backbone has. A resumed run does not read
            it again.
        freeze: Names of modules and parameters of the backbone that are not trained, in a list or separated by commas;
            "all" for all but the last layer.
        thaw_epoch: The epoch, counted from 0, from which on everything is trained; None for never.
        layer_decay: Factor in (0, 1] of the learning rate from each block of the backbone to the one in front of it;
            the last layer has the whole one.

    Attributes:
        loaded: What was loaded from `init_from`; None for nothing.

    Raises:
        ArgumentError: If an argument is out of its range, or if a setting of a layer is NaN.
        OSError: If the weights cannot be read.
        ValueError: If they do not fit the backbone, or if nothing with parameters has a name in `freeze`.
    """

    main_metric: str
    """Name of the metric that the progress bar shows after an evaluation."""
    metric_names: tuple[str, ...]
    """Names of the metrics that may be logged; `*` stands for the name of a class."""
    train_metrics: Metrics
    val_metrics: Metrics
    test_metrics: Metrics

    def __init__(
        self,
        backbone: nn.Module,
        *,
        optimizer: OptimizerCallable = lambda params: SGD(params, lr=0.05, momentum=0.9),
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
        channels_last: bool = True,
        norm_weight_decay: float | None = None,
        bias_weight_decay: float | None = None,
        compile: bool = False,
        init_from: str | None = None,
        freeze: Sequence[str] | str = (),
        thaw_epoch: int | None = None,
        layer_decay: float = 1.0,
    ) -> None:
        check_choice("lr_scheduler_interval", lr_scheduler_interval, ("epoch", "step"))
        most = torch.finfo(torch.float32).max
        check_number("norm_weight_decay", norm_weight_decay, at_least=0, at_most=most, none="the optimizer's")
        check_number("bias_weight_decay", bias_weight_decay, at_least=0, at_most=most, none="the optimizer's")
        check_number("layer_decay", layer_decay, above=0, at_most=1)
        check_layers(backbone)
        super().__init__()
        # Plain values alone, so that a checkpoint needs no pickled code. A task adds its own.
        self.save_hyperparameters(
            *("lr_scheduler_interval", "channels_last", "norm_weight_decay", "bias_weight_decay", "compile"),
            *("init_from", "freeze", "thaw_epoch", "layer_decay"),
        )
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.backbone = backbone
        for filters in (p for p in backbone.parameters() if not is_lazy(p) and p.dim() == 4):
            filters.data = filters.data.to(memory_format=self.memory_format)
        self.loaded = load_weights(backbone, init_from) if init_from and not do_weights_follow() else None
        self.freezing = Freezing(backbone, freeze, thaw_epoch)
        if compile:
            self.backbone.compile()  # in place: torch.compile(backbone) would put _orig_mod. before each name
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.lr_scheduler_interval = lr_scheduler_interval
        self.decays = (norm_weight_decay, bias_weight_decay, layer_decay)
        self.stop_at_nonfinite = True  # whether a training loss that is not finite ends the run
        self.checks = DeferredChecks()
        self._configured: dict[str, Any] = {}
        self._stored: Stored | None = None  # of the checkpoint from which the run goes on
        self._epoch_over = False  # whether the run has resumed behind the last batch of an epoch
        self._accumulated = 0  # number of batches in the gradient
        self._stopping = False  # whether the run stops after this step
        self._private_before = False

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Make the task that a run has trained, and load its weights; no code in the file is run.

        What is not given is made by the configuration of the run, which names classes and functions to import.

        Args:
            checkpoint_path: A file such as runs/quickstart/0/checkpoints/best.ckpt.
            *args: Further arguments of Lightning's method of this name.
            **kwargs: Likewise, and arguments of the task. With a backbone the configuration is not used.

        Raises:
            ValueError: If the file is damaged, or the task in it is another.
        """
        if "backbone" not in kwargs and (config := stored_config(read_checkpoint(checkpoint_path, "meta"))):
            kwargs = make_arguments(cls, config) | kwargs
        with weights_follow():
            return super().load_from_checkpoint(checkpoint_path, *args, **({"weights_only": True} | kwargs))

    def setup(self, stage: str) -> None:
        """Forget the batches of a run that was broken off."""
        for metrics in (self.train_metrics, self.val_metrics, self.test_metrics):
            metrics.reset()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer and its schedule.

        Raises:
            ArgumentError: If a setting of the optimizer is not finite, if the optimizer has no weight decay although
                one is given for norms or biases, or if the schedule follows a metric.
            ValueError: If the groups of parameters are not those of the checkpoint.
        """
        optimizer = make_grouped(self.make_optimizer, self, self.backbone, *self.decays)
        scheduler = self.make_lr_scheduler(optimizer) if self.make_lr_scheduler else None
        follows = isinstance(scheduler, ReduceLROnPlateau)
        allowed = "a schedule of time such as knlightning.tasks.CosineLR"
        hint = "It follows a metric, which a resumed run does not have."
        check(not follows, "lr_scheduler", type(scheduler).__name__, allowed, hint)
        check_settings(optimizer)
        self._configured = configuration(optimizer, scheduler, self.lr_scheduler_interval)
        if self._stored is not None:
            compare_optimizers(self._stored, self._configured, optimizer)
        if scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": self.lr_scheduler_interval},
        }

    def forward(self, images: Tensor) -> Tensor:
        """Apply the backbone to images (N, C, H, W).

        Raises:
            ValueError: If they are too small for it.
        """
        try:
            return self.backbone(images.to(memory_format=self.memory_format) if images.dim() == 4 else images)
        except RuntimeError as error:
            if not found_too_small(error):
                raise
            height, width = images.shape[-2:]
            hint = "Take larger images, or a network that scales them down less, such as one with low_resolution"
            raise ValueError(f"Images of {height}x{width} are too small for the network. {hint}: {error}") from error

    @abstractmethod
    def training_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of a batch, and add the batch to `train_metrics`."""

    @abstractmethod
    def evaluate(self, images: Tensor, labels: Tensor, metrics: Any) -> Any:
        """Add a batch to the metrics of an evaluation, and return its logits, or what else the callbacks take."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Compute the loss of a batch.

        Raises:
            FloatingPointError: If the loss is not finite; on a CUDA device some steps later, but before a checkpoint is
                written.
            ValueError: If the batch is a single image, which batch normalization cannot be trained on.
        """
        try:
            loss = self.training_loss(*batch)
        except ValueError as error:
            if len(batch[0]) != 1 or not has_batch_norm(self):
                raise
            raise ValueError(
                f"{error}. Batch normalization cannot be trained on a single image, which batch {batch_idx} is: leave"
                " out a last batch that is not full (drop_last of the data), or choose another batch_size"
            ) from error
        if self.stop_at_nonfinite:
            where = f"epoch {self.current_epoch}, batch {batch_idx} (step {self.global_step})"
            self.checks.add(loss.detach(), partial(check_finite, where))
        self.log("train/loss_step", loss, prog_bar=True)
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the metrics of the training epoch, before its checkpoint is written.

        What `self.log` sends to the loggers is written after the checkpoint, and would be lost if the process is
        killed in between.
        """
        self.checks.look(wait=True)
        if self._epoch_over:
            return
        values = self._compute("train", self.train_metrics)
        for name, value in values.items():
            self.log(name, value, logger=False, sync_dist=True)  # for the progress bar and the callbacks
        numbers = {name: float(value) for name, value in values.items()}
        for logger in self.loggers:
            logger.log_metrics({**numbers, "epoch": self.current_epoch}, step=self.global_step - 1)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        """Return what the callbacks see of a batch, from `evaluate`."""
        return self.evaluate(*batch, self.val_metrics)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the validation."""
        self._log_evaluation("val", self.val_metrics)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        """Return what the callbacks see of a batch, from `evaluate`."""
        return self.evaluate(*batch, self.test_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test."""
        self._log_evaluation("test", self.test_metrics)

    def _log_evaluation(self, stage: str, metrics: Metrics) -> None:
        self.checks.look(wait=True)
        for name, value in self._compute(stage, metrics).items():
            # all devices have computed the same value: the mean is this value too, and Lightning does not warn
            self.log(name, value, prog_bar=name == f"{stage}/{self.main_metric}", sync_dist=True)

    def _compute(self, stage: str, metrics: Metrics) -> dict[str, Tensor]:
        values = {f"{stage}/{name}": value for name, value in metrics.compute().items()}
        metrics.reset()
        return values

    def check_width(self, logits: Tensor) -> None:
        """Compare the network with the data; the first batch does it, before any step of the optimizer.

        Args:
            logits: Logits (N, classes, ...).

        Raises:
            ValueError: If the number of classes is not that of the datamodule, or the network gives no tensor.
        """
        if not isinstance(logits, Tensor):
            hint = "with aux_logits of false, torchvision's GoogLeNet and Inception give these"
            raise ValueError(f"the network gives a {type(logits).__name__}, and not logits alone; {hint}")
        num_classes = data_of(self.trainer).num_classes
        if num_classes is not None and logits.shape[1] != num_classes:
            raise ValueError(
                f"the network has {logits.shape[1]} outputs and the data have {num_classes} classes: set the"
                f" backbone's num_classes to {num_classes}"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what the optimizer and the schedule were configured with; a run goes on where it was stopped."""
        self.checks.look(wait=True)  # may end the run, before anything is written
        checkpoint["configured"] = self._configured
        rewind_unfinished_epoch(self.trainer, checkpoint)
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined] # set where mypy does not look
        if self._private_before and not any(isinstance(callback, KeepsLedger) for callback in callbacks):
            directory = report_directory(self.trainer)  # on all devices
            if self.trainer.is_global_zero:
                mark_not_private(directory, self.trainer.global_step)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take from the checkpoint of a resumed run what `on_train_start` compares with the configuration."""
        states = checkpoint.get("callbacks", {}).values()
        self._private_before = any(isinstance(state, dict) and "max_grad_norm" in state for state in states)
        if is_resuming(self):
            self._stored = take_from(checkpoint)
            apply_to_callbacks(self.trainer, checkpoint)

    def on_train_start(self) -> None:
        """Give the schedule its length, and apply what the configuration of a resumed run has changed, nothing else.

        Raises:
            ArgumentError: If the schedule has a warm-up that is not shorter than the run.
            ValueError: If the schedule needs the length of a run that has none, or ends before the run, or if no
                parameter is trained.
        """
        stored, self._stored = self._stored, None
        self._accumulated, self._stopping = 0, False
        self._epoch_over = is_epoch_over(self.trainer)
        self.checks.forget()
        self.train_metrics.reset()  # of a trial, such as that of a batch size that did not fit
        start(self.trainer, self._configured, stored)
        self.freezing.begin(self)

    def on_train_epoch_start(self) -> None:
        """Freeze or thaw what the epoch asks for."""
        self._epoch_over = False  # called for epochs that begin, not for one within which a run resumes
        self.freezing.apply(self.current_epoch)

    def on_after_backward(self) -> None:
        """Count the batches in the gradient."""
        self._accumulated += 1

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Make the gradient the mean over its batches, also where an epoch ends before there are enough.

        Lightning divides by the trainer's accumulate_grad_batches, even if fewer batches were left.
        """
        accumulated, self._accumulated = self._accumulated, 0
        if accumulated < self.trainer.accumulate_grad_batches:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.trainer.accumulate_grad_batches / accumulated)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let a run that is told to stop take its step first."""
        self._stop_after_step()

    def on_validation_end(self) -> None:
        """Let a run that is told to stop take its step first."""
        self._stop_after_step()

    def _stop_after_step(self) -> None:
        """Put a stop off to the end of a step: what was accumulated would be lost."""
        self._stopping |= self.trainer.should_stop
        self.trainer.should_stop = self._stopping and not is_accumulating(self.trainer)
        self._stopping &= not self.trainer.should_stop
