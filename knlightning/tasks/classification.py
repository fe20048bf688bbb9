"""Image classification."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric
from torchvision.transforms import v2

from knlightning.tasks.base import Metrics, Task

TOP_K = 5


class ClassificationMetrics(Metrics):
    """Means over the images of an epoch, and over the devices: loss, top-1 and top-5 accuracy."""

    def __init__(self) -> None:
        super().__init__()
        # "disable": a loss that is not a number shows as such; the other strategies would leave its images out
        self.loss = MeanMetric(nan_strategy="disable")
        self.acc = MeanMetric(nan_strategy="disable")
        self.acc_top5 = MeanMetric(nan_strategy="disable")

    @torch.no_grad()
    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            loss: mean loss of the batch.
            logits: (N, classes).
            labels: (N,), integers.
        """
        hits = logits.topk(min(TOP_K, logits.shape[1])).indices == labels[:, None]
        self.loss.update(loss.expand(len(labels)))  # "disable" ignores weights too
        self.acc.update(hits[:, 0].float())
        if logits.shape[1] >= TOP_K:
            self.acc_top5.update(hits.any(dim=1).float())

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics that have seen images, by name."""
        metrics = {"loss": self.loss, "acc": self.acc, "acc_top5": self.acc_top5}
        return {name: metric.compute() for name, metric in metrics.items() if metric.update_called}

    def reset(self) -> None:
        """Begin anew."""
        for metric in (self.loss, self.acc, self.acc_top5):
            metric.reset()


class ClassificationTask(Task):
    """Train a network to tell the class of an image, by cross-entropy.

    Logs `loss` and `acc` (top-1 accuracy in [0, 1]), and `acc_top5` where there are at least five classes, under
    `train/`, `val/` and `test/`: means over all images of an epoch and all devices, so that a short last batch counts
    by its images. While training they are taken as the weights change, with dropout and augmentation; in an epoch
    that was resumed in its middle they cover the batches since then; of a mixed image (mixup, cutmix) the class with
    the larger share counts as the right one.

    Args:
        backbone: network, from images (N, C, H, W) to logits (N, classes).
        label_smoothing: share of the target that is spread over all classes while training, in [0, 1]; the losses of
            validation and test are without.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the schedule from the optimizer; None keeps the rate constant.
        lr_scheduler_interval: whether the schedule advances with every "epoch" or with every optimizer "step".
        channels_last: keep weights and images in the channels-last memory format, often faster on GPUs.
        mixup_alpha: while training, mix images and labels of each batch with their neighbours', in a ratio drawn
            from Beta(alpha, alpha); 0 for no mixup. Source: Zhang et al. (ICLR 2018).
        cutmix_alpha: while training, paste a rectangle of the neighbour into each image, its area drawn likewise,
            and mix the labels by area; 0 for no cutmix. Source: Yun et al. (ICCV 2019). With mixup as well, each
            batch gets one of the two at random.
        norm_weight_decay: weight decay of the parameters of normalization layers, at least 0; None for the
            optimizer's.
        bias_weight_decay: weight decay of the biases, at least 0, other than those of normalization layers that
            norm_weight_decay governs; None for the optimizer's.
        compile: compile the backbone by torch.compile, which takes a while at its first batches.

    Raises:
        ValueError: if label_smoothing is not in [0, 1], or another number is negative or not finite.
    """

    headline = "acc"

    def __init__(
        self,
        backbone: nn.Module,
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable = lambda params: SGD(params, lr=0.05, momentum=0.9),
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
        channels_last: bool = False,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        norm_weight_decay: float | None = None,
        bias_weight_decay: float | None = None,
        compile: bool = False,
    ) -> None:
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"model.init_args.label_smoothing must lie in [0, 1], got {label_smoothing}")
        for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            if not 0 <= alpha < math.inf:
                raise ValueError(f"model.init_args.{name} must be at least 0 (0 for none) and finite, got {alpha}")
        super().__init__(
            backbone,
            optimizer,
            lr_scheduler,
            lr_scheduler_interval,
            channels_last,
            norm_weight_decay,
            bias_weight_decay,
            compile,
        )
        # plain values alone, so that the checkpoint needs no pickled code:
        # ClassificationTask.load_from_checkpoint(path, backbone=...) makes the task anew
        self.save_hyperparameters(
            *("label_smoothing", "lr_scheduler_interval", "channels_last", "mixup_alpha", "cutmix_alpha"),
            *("norm_weight_decay", "bias_weight_decay", "compile"),
        )
        self.label_smoothing = label_smoothing
        mixing = [make(alpha=alpha) for make, alpha in ((v2.MixUp, mixup_alpha), (v2.CutMix, cutmix_alpha)) if alpha]
        self.mixing = v2.RandomChoice(mixing) if mixing else None
        self.train_metrics: ClassificationMetrics = ClassificationMetrics()
        self.val_metrics = ClassificationMetrics()
        self.test_metrics = ClassificationMetrics()

    def training_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of a batch, images (N, C, H, W) and labels (N,), mixed if that is asked for."""
        shares = None
        if self.mixing is not None:  # the identity, mixed as labels are, says whose label counts how much
            images, shares = self.mixing(images, torch.eye(len(images), device=images.device))
        return self._shared_step(images, labels, self.train_metrics, self.label_smoothing, shares)[0]

    def evaluate(self, images: Tensor, labels: Tensor, metrics: ClassificationMetrics) -> Tensor:
        """Return the logits (N, classes) of a batch, images (N, C, H, W) and labels (N,)."""
        return self._shared_step(images, labels, metrics)[1]

    def predict_step(self, batch: tuple[Tensor, list[str]], batch_idx: int) -> Tensor:
        """Return the probabilities (N, classes) of a batch."""
        return self(batch[0]).float().softmax(dim=1)

    def _shared_step(
        self,
        images: Tensor,
        labels: Tensor,
        metrics: ClassificationMetrics,
        label_smoothing: float = 0.0,
        shares: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Apply the network to a batch, and count it.

        Args:
            images: (N, C, H, W).
            labels: (N,), integers.
            metrics: where it is counted.
            label_smoothing: of the loss.
            shares: (N, N), of the labels (columns) in the images (rows); None if each image has its own label alone.

        Returns:
            the mean loss, and the logits (N, classes).
        """
        logits = self(images)
        self.check_width(logits)
        targets = labels
        if shares is not None:
            targets = shares.new_zeros(logits.shape).index_add_(1, labels, shares)
            labels = targets.argmax(dim=1)
        loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
        metrics.update(loss, logits, labels)
        return loss, logits
