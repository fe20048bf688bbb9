"""Semantic segmentation."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict, TypeGuard, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from knlightning.checks import check, check_choice, check_number
from knlightning.protocols import data_of
from knlightning.tasks.base import Task
from knlightning.tasks.deferred import labels_within
from knlightning.tasks.inference import averaged_logits, by_tiles, grid_of_windows
from knlightning.tasks.losses import IGNORED, LossMean, mean_of_pixels, quotient
from knlightning.tasks.metrics import Metrics

CLASS_WEIGHTS = {
    # the public HRNet segmentation code's, which trained the networks of Nasirigerdeh et al. (TMLR 2024), Table 3
    "cityscapes": (
        *(0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023),
        *(0.9539, 0.9843, 1.1116, 0.9037, 1.0865, 1.0955, 1.0865, 1.1529, 1.0507),
    )
}
"""Weights of the classes in the loss, by the name of the dataset."""
SMALL_WINDOW = 64
"""Windows with a shorter side, in pixels, are small, and an image may have at most this number of them:"""
MOST_SMALL_WINDOWS = 1000
LARGEST_WHOLE = 4096 * 4096
"""Most pixels of an image, at the largest scale, that the network is applied to at once."""
LARGEST_SCALE = 10
"""Largest factor of height and width at which evaluation sees images."""


def class_scores(confusion: Tensor) -> dict[str, Tensor]:
    """Compute the scores of a confusion matrix.

    A class without pixels, neither true nor predicted, has no IoU (NaN) and does not count in the mean. A class
    without true pixels does not count in the mean accuracy. (The public HRNet code counts such a class as 0: this makes
    no difference for a dataset in which every class occurs.)

    Args:
        confusion: Number of pixels (classes, classes) by their true class (rows) and their predicted class (columns).

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


class PixelPredictions(TypedDict):
    """What a step of validation or test tells the callbacks of each pixel.

    Attributes:
        classes: Predicted classes (N, H, W).
        probabilities: Their probabilities (N, H, W).
        num_classes: Number of all classes.
    """

    classes: Tensor
    probabilities: Tensor
    num_classes: int


def is_of_pixels(outputs: object) -> TypeGuard[PixelPredictions]:
    """Say whether the outputs of a step are `PixelPredictions`."""
    return isinstance(outputs, dict) and outputs.keys() >= PixelPredictions.__required_keys__


class SegmentationMetrics(Metrics):
    """The loss, and the scores of one confusion matrix of all pixels of an epoch, over all devices.

    Args:
        by_class: Whether the IoU of each class is computed too.
    """

    confusion: MulticlassConfusionMatrix | None

    def __init__(self, by_class: bool) -> None:
        super().__init__()
        self.by_class = by_class
        # "disable": a loss that is not a number makes the sum one
        self.loss_sum = SumMetric(nan_strategy="disable")
        self.loss_divisor = SumMetric(nan_strategy="disable")
        self.confusion = None
        self.names: Sequence[str] = ()

    def prepare(self, names: Sequence[str], device: torch.device) -> None:
        """Make the confusion matrix."""
        if self.confusion is None or self.confusion.num_classes != len(names):
            # not validated: that sorts all pixels of each batch
            made = MulticlassConfusionMatrix(len(names), ignore_index=IGNORED, validate_args=False)
            self.confusion = made.to(device)
        self.names = names

    @torch.no_grad()
    def update(self, loss_sum: Tensor, divisor: Tensor, predicted: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            loss_sum: Sum of the losses, from `knlightning.tasks.losses.mean_of_pixels`.
            divisor: Its divisor, from there too.
            predicted: Predicted classes (N, H, W).
            labels: Classes (N, H, W).
        """
        assert self.confusion is not None
        self.loss_sum.update(loss_sum)
        self.loss_divisor.update(divisor)
        self.confusion.update(predicted, labels)

    def compute(self) -> dict[str, Tensor]:
        """Compute loss and scores by name; the score of a class without pixels is NaN."""
        if self.confusion is None:
            return {}
        scores = class_scores(self.confusion.compute())
        iou = scores.pop("iou")
        values = {"loss": quotient(self.loss_sum.compute(), self.loss_divisor.compute()), **scores}
        if self.by_class:
            values |= {f"iou/{name}": value for name, value in zip(self.names, iou, strict=True)}
        return values


class SegmentationTask(Task):
    """Train a network to tell the class of every pixel, by cross-entropy. Pixels with the label 255 are ignored.

    Logs `loss`, `miou` (mean over the classes of intersection over union), `pixel_acc` and `mean_acc` (mean over the
    classes of the share of a class's pixels that is found) under `train/`, `val/` and `test/`, and the IoU of each
    class as `val/iou/<class>` and `test/iou/<class>`. All scores are in [0, 1] and come from one confusion matrix of
    all pixels of an epoch and all devices. A class without pixels, neither true nor predicted, has no IoU (NaN) and
    does not count in the mean; classes without true pixels do not count in mean_acc. Training metrics are taken while
    the weights change, with dropout and augmentation. In an epoch that is resumed in its middle they cover the batches
    since then.

    Validation, test and prediction average the logits of the image at each of `eval_scales`; with `eval_flip` also
    mirrored; with `eval_window` window by window instead of the whole image. See
    `knlightning.tasks.inference.averaged_logits`. Without windows, an image of more than 16.8 million pixels (4096 x
    4096) at its largest scale is cut into tiles of 2048 x 2048 pixels, which overlap by twice 256. See
    `knlightning.tasks.inference.by_tiles`.

    Args:
        backbone: Network, from images (N, C, H, W) of any size to logits (N, classes, H, W).
        class_weights: Weight of each class's pixels in the loss, or "cityscapes" for those of the public HRNet code,
            which the paper used; None for 1 each. The mean is divided by the sum of the weights.
        loss_mean: Whether the loss is the mean over all labelled pixels of a "batch" (of a device), or of each
            "image" first, 0 if it has none, and then over the images. Private training needs the latter, so that no
            image changes the share of another.
        ohem_threshold: Training keeps only pixels whose true class has a probability below this, in (0, 1]; 0.9 in the
            public HRNet code. None for all pixels.
        ohem_min_kept: Number of the hardest pixels, at least 1, that are kept in any case; of a batch, or with
            loss_mean "image" of each image.
        eval_window: Height and width of windows over the image; None for whole images. An image may have at most 1000
            windows that are less than 64 pixels high or wide.
        eval_stride: Vertical and horizontal step from window to window, at most the window; None for half of it.
        eval_flip: Whether evaluation sees mirrored images too.
        eval_scales: Factors of height and width at which evaluation sees images, above 0 and at most 10.
        **kwargs: Further arguments of `Task`.

    Raises:
        ArgumentError: If an argument is out of its range.
    """

    main_metric = "miou"
    metric_names = ("miou", "pixel_acc", "mean_acc", "loss", "iou/*")
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
        **kwargs: Any,
    ) -> None:
        weights = _checked_weights(class_weights)
        check_choice("loss_mean", loss_mean, get_args(LossMean))
        check_number("ohem_threshold", ohem_threshold, above=0, at_most=1, none="all pixels")
        check_number("ohem_min_kept", ohem_min_kept, at_least=1, integer=True)
        _check_evaluation(eval_window, eval_stride, eval_scales)
        super().__init__(backbone, **kwargs)
        self.save_hyperparameters(
            *("class_weights", "loss_mean", "ohem_threshold", "ohem_min_kept"),
            *("eval_window", "eval_stride", "eval_flip", "eval_scales"),
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
        """Name the classes as the datamodule does; otherwise the first batch tells how many there are."""
        super().setup(stage)
        data = data_of(self.trainer)
        if data.num_classes is None:
            return
        for metrics in (self.train_metrics, self.val_metrics, self.test_metrics):
            metrics.prepare(data.names(data.num_classes), self.device)

    def training_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of a batch, images (N, C, H, W) and labels (N, H, W)."""
        logits = self(images)
        logits, labels = self._checked(logits, labels, self.train_metrics)
        losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
        loss, divisor = mean_of_pixels(
            losses, labels, self.class_weights, self.loss_mean, self.ohem_threshold, self.ohem_min_kept
        )
        self.train_metrics.update(loss.detach(), divisor, logits.argmax(dim=1), labels)
        return quotient(loss, divisor)

    def evaluate(self, images: Tensor, labels: Tensor, metrics: SegmentationMetrics) -> PixelPredictions:
        """Predict the classes of the pixels of a batch, images (N, C, H, W) and labels (N, H, W).

        No more than a tile of the logits is held.
        """

        def of_part(images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            logits, labels = self._checked(self.averaged_logits(images), labels, metrics)
            losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
            highest, predicted = logits.max(dim=1)
            return losses, predicted, (highest - logits.logsumexp(dim=1)).exp(), labels

        losses, predicted, probabilities, labels = self.in_parts(of_part, images, labels)
        metrics.update(*mean_of_pixels(losses, labels, self.class_weights, self.loss_mean), predicted, labels)
        assert metrics.confusion is not None
        return {"classes": predicted, "probabilities": probabilities, "num_classes": metrics.confusion.num_classes}

    def predict_step(self, batch: tuple[Tensor, list[str]], batch_idx: int) -> Tensor:
        """Predict the classes (N, H, W) of a batch."""

        def of_part(images: Tensor) -> tuple[Tensor]:
            logits = self.averaged_logits(images)
            self.check_width(logits)
            return (logits.argmax(dim=1),)

        return self.in_parts(of_part, batch[0])[0]

    def in_parts(self, function: Callable[..., tuple[Tensor, ...]], *images: Tensor) -> tuple[Tensor, ...]:
        """Apply a function to images, and to what belongs to them, part by part if they are large."""
        height, width = (side * max(self.eval_scales) for side in images[0].shape[-2:])
        tiled = self.eval_window is None and height * width > LARGEST_WHOLE
        return by_tiles(function, *images) if tiled else function(*images)

    def averaged_logits(self, images: Tensor) -> Tensor:
        """Compute the logits (N, classes, H, W) of images as evaluation does.

        Raises:
            ArgumentError: If there are so many small windows in an image that the evaluation hardly ends.
        """
        if self.eval_window is not None and min(self.eval_window) < SMALL_WINDOW:
            height, width = (round(side * max(self.eval_scales)) for side in images.shape[-2:])
            rows, columns = grid_of_windows((height, width), self.eval_window, self.eval_stride)
            few = len(rows) * len(columns) <= MOST_SMALL_WINDOWS
            allowed = (
                f"at least {SMALL_WINDOW} pixels high and wide, or so large that an image has at most"
                f" {MOST_SMALL_WINDOWS} windows (one of {height} x {width} has {len(rows) * len(columns)})"
            )
            check(few, "eval_window", self.eval_window, allowed)
        return averaged_logits(self, images, self.eval_window, self.eval_stride, self.eval_flip, self.eval_scales)

    def _checked(self, logits: Tensor, labels: Tensor, metrics: SegmentationMetrics) -> tuple[Tensor, Tensor]:
        """Compare network, weights and labels: the errors of the loss itself are hard to understand.

        Returns:
            The logits, in float32 at least, and the labels.
        """
        self.check_width(logits)
        num_classes = logits.shape[1]
        if metrics.confusion is None:
            metrics.prepare([str(number) for number in range(num_classes)], logits.device)
        if logits.shape[:1] + logits.shape[2:] != labels.shape:
            raise ValueError(
                f"labels of the shape {tuple(labels.shape)} do not fit logits (N, classes, H, W) of the shape"
                f" {tuple(logits.shape)}: every pixel needs a label and the network an output for each pixel, as the"
                " networks knlightning.models.fcn_* have"
            )
        if self.class_weights is not None and len(self.class_weights) != num_classes:
            raise ValueError(
                f"class_weights are {len(self.class_weights)} numbers, and the network has {num_classes} classes: give"
                " one for each class, or null"
            )
        message = (
            f"a pixel has the label {{label}}, and the network has {num_classes} classes: labels must be 0 to"
            f" {num_classes - 1}, or {IGNORED} for pixels to be ignored"
        )
        labels = labels_within(self.checks, labels, num_classes, message, IGNORED)
        return (logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits), labels


def _checked_weights(class_weights: list[float] | str | None) -> Tensor | None:
    if class_weights is None:
        return None
    if isinstance(class_weights, str):
        check_choice("class_weights", class_weights, list(CLASS_WEIGHTS), "Or give a list of numbers.")
        return torch.tensor(CLASS_WEIGHTS[class_weights])
    check(len(class_weights) > 0, "class_weights", class_weights, "a list of numbers, one for each class")
    for number, weight in enumerate(class_weights):
        check_number(f"class_weights[{number}]", weight, at_least=0)
    return torch.tensor(class_weights, dtype=torch.get_default_dtype())


def _check_evaluation(window: tuple[int, int] | None, stride: tuple[int, int] | None, scales: Sequence[float]) -> None:
    if window is not None:
        ok = len(window) == 2 and all(isinstance(side, int) and side >= 1 for side in window)
        check(ok, "eval_window", window, "a height and a width of at least 1, or null for whole images")
    if stride is not None:
        allowed = f"at least 1 and at most eval_window {window}, or null for half of it"
        ok = window is not None and all(1 <= step <= size for step, size in zip(stride, window, strict=True))
        check(ok, "eval_stride", stride, allowed, "Otherwise pixels are left out.")
    check(len(scales) > 0, "eval_scales", scales, "a list of numbers above 0")
    for number, scale in enumerate(scales):
        check_number(f"eval_scales[{number}]", scale, above=0, at_most=LARGEST_SCALE)
