"""Image classification."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchvision.transforms import v2

from knlightning.checks import check, check_number
from knlightning.tasks.base import Task
from knlightning.tasks.deferred import labels_within
from knlightning.tasks.metrics import Metrics

TOP_K = 5
MOST_ALPHA = 1000
"""Largest alpha of mixup and cutmix; with it all ratios are a half, with a standard deviation of 0.01."""


class ClassificationMetrics(Metrics):
    """Means over the images of an epoch, and over the devices: loss, top-1 and top-5 accuracy."""

    def __init__(self) -> None:
        super().__init__()
        # "disable": a loss that is not a number makes the mean one; the other strategies would leave its images out
        self.loss = MeanMetric(nan_strategy="disable")
        self.acc = MeanMetric(nan_strategy="disable")
        self.acc_top5 = MeanMetric(nan_strategy="disable")

    @torch.no_grad()
    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            loss: Mean loss of the batch.
            logits: Logits (N, classes).
            labels: Classes (N,), integers.
        """
        hits = logits.topk(min(TOP_K, logits.shape[1])).indices == labels[:, None]
        self.loss.update(loss.expand(len(labels)))  # "disable" ignores weights too
        self.acc.update(hits[:, 0].float())
        if logits.shape[1] >= TOP_K:
            self.acc_top5.update(hits.any(dim=1).float())

    def compute(self) -> dict[str, Tensor]:
        """Compute the metrics that have seen images, by name."""
        metrics = {"loss": self.loss, "acc": self.acc, "acc_top5": self.acc_top5}
        return {name: metric.compute() for name, metric in metrics.items() if metric.update_called}


class ClassificationTask(Task):
    """Train a network to tell the class of an image, by cross-entropy.

    Logs `loss` and `acc` (top-1 accuracy in [0, 1]), and with at least five classes `acc_top5`, under `train/`, `val/`
    and `test/`: means over all images of an epoch and all devices, so that every image counts the same. Training
    metrics are taken while the weights change, with dropout and augmentation. In an epoch that is resumed in its
    middle they cover the batches since then. For a mixed image (mixup, cutmix) the class with the larger share counts
    as the true one.

    Args:
        backbone: Network, from images (N, C, H, W) to logits (N, classes).
        label_smoothing: Share of the target that is spread over all classes in training, in [0, 1]; the losses of
            validation and test do without.
        mixup_alpha: Training mixes the images and labels of each batch with their neighbours', in a ratio drawn from
            Beta(alpha, alpha); from 0 to 1000, and 0 for no mixup. Source: Zhang et al. (ICLR 2018).
        cutmix_alpha: Training pastes a rectangle of the neighbour into each image, with an area drawn likewise, and
            mixes the labels by area; from 0 to 1000, and 0 for no cutmix. Source: Yun et al. (ICCV 2019). With mixup as
            well, each batch gets one of the two at random.
        class_weights: Factor of the training loss of each class, at least 0, in the order of the labels; None for 1.
            The loss stays a mean over images, which is not divided by the sum of the factors.
        focal_gamma: The training loss of an image is multiplied by (1 - p)^gamma, where p is the probability of its
            class, at least 0; 2 is usual, and 0 is no focal loss. Source: Lin et al. (ICCV 2017).
        eval_flip: Whether validation, test and prediction average the logits of an image and of its mirror image.
        **kwargs: Further arguments of `Task`.

    Raises:
        ArgumentError: If an argument is out of its range.
    """

    main_metric = "acc"
    metric_names = ("acc", "acc_top5", "loss")

    def __init__(
        self,
        backbone: nn.Module,
        label_smoothing: float = 0.0,
        *,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        class_weights: list[float] | None = None,
        focal_gamma: float = 0.0,
        eval_flip: bool = False,
        **kwargs: Any,
    ) -> None:
        check_number("label_smoothing", label_smoothing, at_least=0, at_most=1)
        check_number("mixup_alpha", mixup_alpha, at_least=0, at_most=MOST_ALPHA)
        check_number("cutmix_alpha", cutmix_alpha, at_least=0, at_most=MOST_ALPHA)
        check_number("focal_gamma", focal_gamma, at_least=0)
        for number, weight in enumerate(class_weights or ()):
            check_number(f"class_weights[{number}]", weight, at_least=0)
        super().__init__(backbone, **kwargs)
        self.save_hyperparameters("label_smoothing", "mixup_alpha", "cutmix_alpha", "class_weights", "focal_gamma")
        self.save_hyperparameters("eval_flip")
        self.label_smoothing, self.focal_gamma, self.eval_flip = label_smoothing, focal_gamma, eval_flip
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.get_default_dtype())
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", weights, persistent=False)  # of the configuration, not the checkpoint
        mixing = [make(alpha=alpha) for make, alpha in ((v2.MixUp, mixup_alpha), (v2.CutMix, cutmix_alpha)) if alpha]
        self.mixing = v2.RandomChoice(mixing) if mixing else None
        self.train_metrics: ClassificationMetrics = ClassificationMetrics()
        self.val_metrics = ClassificationMetrics()
        self.test_metrics = ClassificationMetrics()

    def training_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of a batch, images (N, C, H, W) and labels (N,), after mixup or cutmix if asked for."""
        shares = None
        if self.mixing is not None:  # the identity matrix, mixed like labels, becomes the shares of the labels
            images, shares = self.mixing(images, torch.eye(len(images), device=images.device))
        logits = self(images)
        self.check_width(logits)
        labels = self._checked(labels, *logits.shape)
        targets: Tensor | None = None
        if shares is not None:
            targets = shares.new_zeros(logits.shape).index_add_(1, labels, shares)
            labels = targets.argmax(dim=1)
        loss = self._loss(logits, labels, targets)
        self.train_metrics.update(loss, logits, labels)
        return loss

    def _loss(self, logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
        """Compute the training loss.

        Args:
            logits: Logits (N, classes).
            labels: Classes (N,), integers.
            targets: Shares (N, classes) of the classes in mixed images; None if each image has its own class alone.
        """
        if self.class_weights is not None:
            count, classes = len(self.class_weights), logits.shape[1]
            check(
                count == classes, "class_weights", f"{count} weights", f"one weight for each of the {classes} classes"
            )
        # the mean over all samples, for private training: with a label that it ignores, cross_entropy divides by others
        losses = F.cross_entropy(
            logits,
            labels if targets is None else targets,
            None if self.class_weights is None else self.class_weights.to(logits.dtype),
            label_smoothing=self.label_smoothing,
            reduction="none",
        )
        if self.focal_gamma:
            shares = F.one_hot(labels, logits.shape[1]) if targets is None else targets
            missing = 1 - (logits.softmax(dim=1) * shares).sum(dim=1)
            # the slope of a power below 1 has no limit at 0
            losses = losses * missing.clamp(min=torch.finfo(missing.dtype).eps) ** self.focal_gamma
        return losses.mean()

    def evaluate(self, images: Tensor, labels: Tensor, metrics: ClassificationMetrics) -> Tensor:
        """Compute the logits (N, classes) of a batch, images (N, C, H, W) and labels (N,)."""
        logits = self.averaged_logits(images)
        self.check_width(logits)
        labels = self._checked(labels, *logits.shape)
        metrics.update(F.cross_entropy(logits, labels, reduction="none").mean(), logits, labels)
        return logits

    def predict_step(self, batch: tuple[Tensor, list[str]], batch_idx: int) -> Tensor:
        """Compute the probabilities (N, classes) of a batch."""
        return self.averaged_logits(batch[0]).float().softmax(dim=1)

    def averaged_logits(self, images: Tensor) -> Tensor:
        """Compute the logits (N, classes) of images (N, C, H, W) as evaluation does."""
        return (self(images) + self(images.flip(-1))) / 2 if self.eval_flip else self(images)

    def _checked(self, labels: Tensor, num_images: int, num_classes: int) -> Tensor:
        """Check the labels of a batch."""
        if labels.shape != (num_images,) or labels.is_floating_point():
            raise ValueError(
                f"labels must be whole numbers, one for each of the {num_images} images of a batch, got"
                f" {labels.dtype} of the shape {tuple(labels.shape)}"
            )
        message = (
            f"an image has the label {{label}}, and the network has {num_classes} classes: labels must be 0 to"
            f" {num_classes - 1}. Correct the labels, or set the backbone's num_classes"
        )
        return labels_within(self.checks, labels, num_classes, message)
