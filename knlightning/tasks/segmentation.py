"""Semantic segmentation."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from knlightning.tasks.base import Metrics, Task
from knlightning.tasks.inference import averaged_logits
from knlightning.tasks.losses import IGNORED, LossMean, pixel_cross_entropy, quotient

CLASS_WEIGHTS = {
    # the public HRNet segmentation code's, which trained the networks of Nasirigerdeh et al. (TMLR 2024), Table 3
    "cityscapes": (
        *(0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023),
        *(0.9539, 0.9843, 1.1116, 0.9037, 1.0865, 1.0955, 1.0865, 1.1529, 1.0507),
    )
}
"""Weights of the classes by the name of the dataset."""


def class_scores(confusion: Tensor) -> dict[str, Tensor]:
    """Compute the scores of a confusion matrix.

    A class without pixels, neither true nor predicted, has no IoU (NaN), and the mean leaves it out; so does the mean
    accuracy with classes that no pixel belongs to. (The public HRNet code counts such a class as 0: on a set in which
    every class occurs there is no difference.)

    Args:
        confusion: (classes, classes), pixels by their true class (rows) and their predicted one.

    Returns:
        "iou" (classes,), and scalars "miou", "pixel_acc" and "mean_acc", in [0, 1].
    """
    confusion = confusion.float()
    hits, true, predicted = confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)
    iou = hits / (true + predicted - hits)  # 0 / 0 is NaN
    return {
        "iou": iou,
        "miou": iou.nanmean(),
        "pixel_acc": hits.sum() / true.sum(),
        "mean_acc": (hits / true).nanmean(),
    }


class SegmentationMetrics(Metrics):
    """The loss, and the scores of one confusion matrix of all pixels of an epoch, over all devices.

    Args:
        by_class: whether the IoU of each class is given too.
    """

    confusion: MulticlassConfusionMatrix | None

    def __init__(self, by_class: bool) -> None:
        super().__init__()
        self.by_class = by_class
        # "disable": a loss that is not a number shows as such
        self.loss_sum = SumMetric(nan_strategy="disable")
        self.loss_divisor = SumMetric(nan_strategy="disable")
        self.confusion = None
        self.names: Sequence[str] = ()

    def prepare(self, classes: int, names: Sequence[str] | None, device: torch.device) -> None:
        """Make the confusion matrix.

        Args:
            classes: their number.
            names: of the classes; None for their numbers.
            device: where it is counted.
        """
        if self.confusion is None or self.confusion.num_classes != classes:
            # not validated: that sorts all pixels of each batch
            made = MulticlassConfusionMatrix(classes, ignore_index=IGNORED, validate_args=False)
            self.confusion = made.to(device)
        self.names = names if names and len(names) == classes else [str(number) for number in range(classes)]

    @torch.no_grad()
    def update(self, loss_sum: Tensor, divisor: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            loss_sum: as from :func:`knlightning.tasks.losses.pixel_cross_entropy`.
            divisor: likewise.
            logits: (N, classes, H, W).
            labels: (N, H, W).
        """
        self.loss_sum.update(loss_sum)
        self.loss_divisor.update(divisor)
        if self.confusion is None:
            self.prepare(logits.shape[1], None, logits.device)
        assert self.confusion is not None
        self.confusion.update(logits.argmax(dim=1), labels)

    def compute(self) -> dict[str, Tensor]:
        """Return loss and scores by name; NaN is the score of what has no pixels."""
        if self.confusion is None:
            return {}
        scores = class_scores(self.confusion.compute())
        iou = scores.pop("iou")
        values = {"loss": quotient(self.loss_sum.compute(), self.loss_divisor.compute()), **scores}
        if self.by_class:
            values |= {f"iou/{name}": value for name, value in zip(self.names, iou, strict=True)}
        return values

    def reset(self) -> None:
        """Begin anew."""
        for metric in (self.loss_sum, self.loss_divisor, self.confusion):
            if metric is not None:
                metric.reset()


class SegmentationTask(Task):
    """Train a network to tell the class of every pixel, by cross-entropy. Pixels labelled 255 are ignored.

    Logs `loss`, `miou` (mean over the classes of intersection over union), `pixel_acc` and `mean_acc` (mean over the
    classes of the share of a class's pixels that is found) under `train/`, `val/` and `test/`, and the IoU of each
    class as `val/iou/<class>` and `test/iou/<class>`. All scores are in [0, 1] and come from one confusion matrix of
    all pixels of an epoch and all devices; a class without pixels, neither true nor predicted, has no IoU (NaN) and
    is left out of the mean, and so are classes without true pixels in mean_acc. While training they are
    taken as the weights change, with dropout and augmentation; in an epoch that was resumed in its middle they cover
    the batches since then.

    Validation, test and prediction see whole images, or in this order: the image at each of `eval_scales`; as it is
    and, with `eval_flip`, mirrored; the whole or, with `eval_window`, window after window. The mean of the logits
    counts (:func:`knlightning.tasks.inference.averaged_logits`).

    Args:
        backbone: network, from images (N, C, H, W) of any size to logits (N, classes, H, W).
        class_weights: weight of each class's pixels in the loss, or "cityscapes" for those of the public HRNet code,
            which the paper used; None for 1 each. The mean is divided by the sum of the weights.
        loss_mean: whether the loss is the mean over all labelled pixels of a "batch" (of a device), or for each
            "image" first, 0 where it has none, and then over the images: for private training, where no image may
            change the share of another.
        ohem_threshold: while training, keep only pixels whose true class has a probability below this, in (0, 1];
            0.9 in the public HRNet code. None for all pixels.
        ohem_min_kept: pixels that are kept at least, the hardest ones, of a batch or with loss_mean "image" of each
            image.
        eval_window: height and width of windows over the image; None for whole images.
        eval_stride: vertical and horizontal step from window to window, at most the window; None for half of it.
        eval_flip: whether mirrored images are seen too.
        eval_scales: factors of height and width at which images are seen.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the schedule from the optimizer; None keeps the rate constant.
        lr_scheduler_interval: whether the schedule advances with every "epoch" or with every optimizer "step".
        channels_last: keep weights and images in the channels-last memory format, often faster on GPUs.
        norm_weight_decay: weight decay of the parameters of normalization layers, at least 0; None for the
            optimizer's.
        bias_weight_decay: weight decay of the biases, at least 0, other than those of normalization layers that
            norm_weight_decay governs; None for the optimizer's.
        compile: compile the backbone by torch.compile, which takes a while at its first batches.

    Raises:
        ValueError: if an argument is out of its range.
    """

    headline = "miou"
    ignore_index = IGNORED

    def __init__(
        self,
        backbone: nn.Module,
        class_weights: list[float] | Literal["cityscapes"] | None = None,
        loss_mean: LossMean = "batch",
        ohem_threshold: float | None = None,
        ohem_min_kept: int = 131_072,
        eval_window: tuple[int, int] | None = None,
        eval_stride: tuple[int, int] | None = None,
        eval_flip: bool = False,
        eval_scales: list[float] = [1.0],  # noqa: B006 # never changed; a tuple's type would fix the length
        optimizer: OptimizerCallable = lambda params: SGD(params, lr=0.05, momentum=0.9),
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
        channels_last: bool = False,
        norm_weight_decay: float | None = None,
        bias_weight_decay: float | None = None,
        compile: bool = False,
    ) -> None:
        weights = _checked_weights(class_weights)
        _check_loss(loss_mean, ohem_threshold, ohem_min_kept)
        _check_evaluation(eval_window, eval_stride, eval_scales)
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
        # plain values alone, as in ClassificationTask
        self.save_hyperparameters(
            *("class_weights", "loss_mean", "ohem_threshold", "ohem_min_kept"),
            *("eval_window", "eval_stride", "eval_flip", "eval_scales", "lr_scheduler_interval", "channels_last"),
            *("norm_weight_decay", "bias_weight_decay", "compile"),
        )
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", weights, persistent=False)  # of the configuration, not the checkpoint
        self.loss_mean = loss_mean
        self.ohem_threshold = ohem_threshold
        self.ohem_min_kept = ohem_min_kept
        self.eval_window = eval_window
        self.eval_stride = eval_stride
        self.eval_flip = eval_flip
        self.eval_scales = eval_scales
        self.train_metrics: SegmentationMetrics = SegmentationMetrics(by_class=False)
        self.val_metrics: SegmentationMetrics = SegmentationMetrics(by_class=True)
        self.test_metrics: SegmentationMetrics = SegmentationMetrics(by_class=True)

    def setup(self, stage: str) -> None:
        """Name the classes as the datamodule does; without one, they are counted by the first batch."""
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        classes, names = (getattr(datamodule, name, None) for name in ("num_classes", "class_names"))
        if not classes:
            return
        for metrics in (self.train_metrics, self.val_metrics, self.test_metrics):
            metrics.prepare(classes, names, self.device)

    def training_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of a batch, images (N, C, H, W) and labels (N, H, W)."""
        logits = self(images)
        return self._count(logits, labels, self.train_metrics, self.ohem_threshold)

    def evaluate(self, images: Tensor, labels: Tensor, metrics: SegmentationMetrics) -> Tensor:
        """Return the logits (N, classes, H, W) of a batch, images (N, C, H, W) and labels (N, H, W)."""
        logits = self.averaged_logits(images)
        self._count(logits, labels, metrics, None)
        return logits

    def predict_step(self, batch: tuple[Tensor, list[str]], batch_idx: int) -> Tensor:
        """Return the classes (N, H, W) of a batch."""
        logits = self.averaged_logits(batch[0])
        self.check_width(logits)
        return logits.argmax(dim=1)

    def averaged_logits(self, images: Tensor) -> Tensor:
        """Compute the logits (N, classes, H, W) of images in the ways of the evaluation."""
        return averaged_logits(self, images, self.eval_window, self.eval_stride, self.eval_flip, self.eval_scales)

    def _count(
        self, logits: Tensor, labels: Tensor, metrics: SegmentationMetrics, ohem_threshold: float | None
    ) -> Tensor:
        """Return the loss of a batch, and add it to the metrics."""
        self.check_width(logits)
        self._check_pixels(logits, labels)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        loss, divisor = pixel_cross_entropy(
            logits, labels, self.class_weights, self.loss_mean, ohem_threshold, self.ohem_min_kept
        )
        metrics.update(loss.detach(), divisor, logits.detach(), labels)
        return quotient(loss, divisor)

    def _check_pixels(self, logits: Tensor, labels: Tensor) -> None:
        """Compare network, weights and labels, before a loss fails in a way that nobody understands."""
        classes = logits.shape[1]
        if logits.shape[:1] + logits.shape[2:] != labels.shape:
            raise ValueError(
                f"labels of the shape {tuple(labels.shape)} do not fit logits (N, classes, H, W) of the shape"
                f" {tuple(logits.shape)}: every pixel needs a label and the network an output for each pixel, as the"
                " networks knlightning.models.fcn_* have"
            )
        if self.class_weights is not None and len(self.class_weights) != classes:
            raise ValueError(
                f"model.init_args.class_weights are {len(self.class_weights)} numbers, and the network tells {classes}"
                " classes apart: give one for each class, or null"
            )
        outside = (labels != IGNORED) & ((labels < 0) | (labels >= classes))
        if outside.any():
            raise ValueError(
                f"a pixel has the label {int(labels[outside][0])}, and the network tells {classes} classes apart:"
                f" labels are 0 to {classes - 1}, or {IGNORED} for pixels to be ignored"
            )


def _checked_weights(class_weights: list[float] | str | None) -> Tensor | None:
    if class_weights is None:
        return None
    if isinstance(class_weights, str):
        if class_weights not in CLASS_WEIGHTS:
            raise ValueError(
                f"model.init_args.class_weights must be a list of numbers or one of {', '.join(CLASS_WEIGHTS)}, got"
                f" {class_weights!r}"
            )
        return torch.tensor(CLASS_WEIGHTS[class_weights])
    if not class_weights or not all(0 <= weight < math.inf for weight in class_weights):
        raise ValueError(
            f"model.init_args.class_weights must be numbers of at least 0, one for each class, got {class_weights}"
        )
    return torch.tensor(class_weights, dtype=torch.get_default_dtype())


def _check_loss(loss_mean: str, ohem_threshold: float | None, ohem_min_kept: int) -> None:
    if loss_mean not in get_args(LossMean):
        raise ValueError(f"model.init_args.loss_mean must be one of {', '.join(get_args(LossMean))}, got {loss_mean!r}")
    if ohem_threshold is not None and not 0 < ohem_threshold <= 1:
        raise ValueError(
            "model.init_args.ohem_threshold must be a probability in (0, 1], or null for all pixels, got"
            f" {ohem_threshold}"
        )
    if ohem_min_kept < 1:
        raise ValueError(f"model.init_args.ohem_min_kept must be at least 1, got {ohem_min_kept}")


def _check_evaluation(window: tuple[int, int] | None, stride: tuple[int, int] | None, scales: Sequence[float]) -> None:
    if window is not None and min(window) < 1:
        raise ValueError(f"model.init_args.eval_window must be a height and a width of at least 1, got {window}")
    if stride is not None and window is None:
        raise ValueError("model.init_args.eval_stride is the step between windows, and eval_window is null: give both")
    if stride is not None and window is not None:
        for step, size in zip(stride, window, strict=True):
            if not 1 <= step <= size:
                raise ValueError(
                    f"model.init_args.eval_stride must be at least 1 and at most eval_window {window}, so that no"
                    f" pixel is left out, got {stride}"
                )
    if not scales or not all(0 < scale < math.inf for scale in scales):
        raise ValueError(f"model.init_args.eval_scales must be numbers above 0, at least one, got {scales}")
