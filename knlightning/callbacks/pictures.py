"""Pictures of the validation in TensorBoard."""

import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from knlightning.callbacks.harmless import Harmless
from knlightning.callbacks.label_maps import add_legend, coloured, palette_of
from knlightning.callbacks.scores import confused_pairs
from knlightning.checks import check_number
from knlightning.internals.lightning import is_fitting
from knlightning.protocols import DataDescription, data_of
from knlightning.tasks.segmentation import class_scores, is_of_pixels
from knlightning.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMED_CLASSES = 25
"""With more classes, the confusion matrix has neither names nor counts: the classes confused most are named beside."""
LARGEST_COUNT = 9999
"""If a count is larger, such as one of pixels, the cells of the confusion matrix show shares of the true class."""
MOST_CLASSES = 2000
"""With more classes, there is no confusion matrix: its memory grows with their square."""
MOST_LETTERS = 40
"""Longer names are cut."""
TITLE_LETTERS = 17
"""Width of the titles of small images; longer ones go on in the next line."""
COLUMNS = 4
"""Images beside each other: TensorBoard shows the page small, and titles must be readable."""
MOST_SCENES = 8
"""Largest number of images on a page for segmentation."""
SCENE_SIDE = 512
"""Images for segmentation are shown with every k-th pixel, so that no side is longer than twice that."""


class Pictures(Callback):
    """Draw the confusion matrix and a page of predictions after validation, for TensorBoard.

    The validation step of the task must return the logits (N, classes), or for segmentation
    `knlightning.tasks.segmentation.PixelPredictions`, and batches must be (images, labels). Labels of pixels that are
    the task's `ignore_index` do not count. For segmentation each image is shown with its true and its
    predicted classes in colours, and the intersection over union of each class is drawn too; the images are the first
    ones. In classification they come from all classes, from each equally many, with those first that are wrong. What is
    known of the data (`knlightning.protocols.DataDescription`: names and colours of the classes, how to undo the
    scaling) comes from the datamodule.

    What cannot be drawn never ends a run: it is left out, with a warning. With more than 2000 classes there is no
    confusion matrix.

    Args:
        every_n_epochs: Epochs from one drawing to the next; the last epoch is always drawn. 0 for none at all.
        images: Number of images on the page, at least 0; for segmentation at most 8 are shown.

    Raises:
        ArgumentError: If an argument is out of its range.
    """

    def __init__(self, every_n_epochs: int = 5, images: int = 24) -> None:
        check_number("every_n_epochs", every_n_epochs, at_least=0, integer=True)
        check_number("images", images, at_least=0, integer=True)
        self.every_n_epochs = every_n_epochs
        self.images = images
        self._confusion: MulticlassConfusionMatrix | None = None
        self._of_pixels = False
        self._page: list[tuple[Tensor, Tensor, Tensor]] = []
        self._harmless = Harmless()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what the last validation has counted."""
        self._confusion, self._page = None, []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the predictions, and keep some images."""
        of_pixels = is_of_pixels(outputs)
        if not self._due(trainer) or not (of_pixels or (isinstance(outputs, Tensor) and outputs.ndim == 2)):
            return
        num_classes = outputs["num_classes"] if of_pixels else outputs.shape[1]
        if num_classes > MOST_CLASSES:
            self._harmless.warn("the confusion matrix", f"{num_classes} classes, at most {MOST_CLASSES} are drawn")
        elif self._confusion is None:  # before anything that may fail: it is computed by all devices together
            ignored = getattr(pl_module, "ignore_index", None)
            # not validated: the task checks the labels
            made = MulticlassConfusionMatrix(num_classes, ignore_index=ignored, validate_args=False)
            self._confusion = made.to(pl_module.device)
        with self._harmless("pictures of a batch"):
            images, labels = batch
            self._of_pixels = of_pixels
            predicted = outputs["classes"] if of_pixels else outputs.argmax(dim=1)
            if self._confusion is not None:
                self._confusion.update(predicted, labels)
            self._keep(images, labels, predicted, outputs)

    def _keep(self, images: Tensor, labels: Tensor, predicted: Tensor, outputs: Any) -> None:
        most = min(self.images, MOST_SCENES) if self._of_pixels else self.images
        if not most or not len(labels):
            return
        if self._of_pixels:
            missing = most - sum(len(kept) for kept, _, _ in self._page)
            step = max(1, max(labels.shape[1:]) // SCENE_SIDE)  # whole images of streets would take gigabytes
            scenes = (images[:missing], labels[:missing], predicted[:missing])
            if missing > 0:
                images, labels, predicted = (part[..., ::step, ::step].cpu() for part in scenes)
                self._page.append((images, labels, predicted))
            return
        batch = (images, labels.cpu(), outputs.float().softmax(dim=1).cpu())
        old, old_labels, old_probabilities = self._page[0] if self._page else tuple(part[:0].cpu() for part in batch)
        labels, probabilities = torch.cat((old_labels, batch[1])), torch.cat((old_probabilities, batch[2]))
        chosen = spread_over_classes(labels, probabilities.argmax(dim=1) != labels, most)
        new = chosen[chosen >= len(old)] - len(old)
        pictures = torch.cat((old[chosen[chosen < len(old)]], images[new.to(images.device)].cpu()))
        self._page = [(pictures, labels[chosen], probabilities[chosen])]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        # a sum over the devices, so asked of each
        counts = None if self._confusion is None else self._confusion.compute().cpu()
        writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not trainer.is_global_zero or not writers:
            return
        data = data_of(trainer)
        for tag, draw in self._figures(counts, data).items():
            with self._harmless(f"the picture {tag}"), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph .* missing from")  # a box stands for it
                figure = draw()
                for writer in writers:
                    writer.add_figure(tag, figure, trainer.global_step - 1)  # the step of the validation's metrics

    def _figures(self, counts: Tensor | None, data: DataDescription) -> dict[str, Callable[[], "Figure"]]:
        figures: dict[str, Callable[[], Figure]] = {}
        if counts is not None:
            names = data.names(len(counts))
            figures["val/confusion"] = lambda: confusion_figure(counts, names)
            if self._of_pixels:
                figures["val/iou"] = lambda: iou_figure(class_scores(counts)["iou"], names)
        if self._page:
            figures["val/predictions"] = lambda: self._predictions(data, counts)
        return figures

    def _predictions(self, data: DataDescription, counts: Tensor | None) -> "Figure":
        if self._of_pixels:
            page = [part for images, *maps in self._page for part in zip(data.displayable(images), *maps, strict=True)]
            highest = max(int(shown.max()) for _, _, shown in self._page)
            num_classes = highest + 1 if counts is None else len(counts)
            return scenes_figure(page, palette_of(data, num_classes), data.names(num_classes))
        ((images, labels, probabilities),) = self._page
        order = (probabilities.argmax(dim=1) == labels).int().argsort(stable=True)  # wrong ones first
        names = data.names(probabilities.shape[1])
        return predictions_figure(data.displayable(images[order]), labels[order], probabilities[order], names)

    def _due(self, trainer: Trainer) -> bool:
        if not self.every_n_epochs or trainer.sanity_checking or not is_fitting(trainer):
            return False
        done = trainer.current_epoch + 1
        return done % self.every_n_epochs == 0 or done == trainer.max_epochs


def spread_over_classes(labels: Tensor, wrong: Tensor, number: int) -> Tensor:
    """Choose images of all classes, from each equally many, and of each class those first that are wrong.

    What is chosen in parts, each with what was chosen before, is the same as what is chosen at once.

    Args:
        labels: Classes (N,), integers.
        wrong: Whether each image is taken for another class (N,).
        number: Largest number of images.

    Returns:
        Their indices in ascending order.
    """
    right = (~wrong).long()
    order = (2 * labels + right).argsort(stable=True)
    ordered = labels[order]
    place_in_class = torch.arange(len(order)) - torch.searchsorted(ordered, ordered)
    return order[(2 * place_in_class + right[order]).argsort(stable=True)[:number]].sort().values


def _label(name: str) -> str:
    """Write a name for matplotlib, which takes what is between two `$` for a formula."""
    return printable(name)[:MOST_LETTERS].replace("$", r"\$")


def _wrapped(name: str, before: str = "", after: str = "") -> str:
    """Write a name, with what stands before and after it, in lines for the title of a small image."""
    text = f"{before}{printable(name)[:MOST_LETTERS]}{after}"
    return "\n".join(_label(line) for line in textwrap.wrap(text, TITLE_LETTERS))


def confusion_figure(counts: Tensor, names: Sequence[str]) -> "Figure":
    """Draw a confusion matrix; beside one without names, the pairs of classes that are confused most often.

    Args:
        counts: Images or pixels (classes, classes); rows are the true classes.
        names: Names of the classes.
    """
    from matplotlib.figure import Figure  # slow to import, and not needed by `knl --help`

    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    labels = [_label(name) for name in names]
    named = len(names) <= MOST_NAMED_CLASSES
    figure = Figure(figsize=(3.5 + 0.3 * max(len(names), 10), 2.8 + 0.3 * max(len(names), 10)) if named else (13, 6))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot(1, 1 if named else 2, 1)
    figure.colorbar(axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1), label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true")
    if not named:
        _draw_pairs(figure.add_subplot(1, 2, 2), confused_pairs(counts, labels))
        return figure
    axes.set_xticks(range(len(names)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), labels)
    for row, column in counts.nonzero().tolist():
        colour = "white" if shares[row, column] > 0.5 else "black"
        share, count = shares[row, column], int(counts[row, column])
        text = str(count) if counts.max() <= LARGEST_COUNT else f"{share:.0%}" if share >= 0.005 else ""
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    return figure


def _draw_pairs(axes: "Axes", pairs: Sequence[tuple[str, str, int, float]]) -> None:
    """Draw how often classes are taken for others."""
    bars = axes.barh(range(len(pairs)), [count for _, _, count, _ in pairs], color="#8f9bdc")
    axes.bar_label(bars, [f"{count:,} ({share:.0%})" for _, _, count, share in pairs], padding=3, fontsize=8)
    axes.set_yticks(range(len(pairs)), [f"{true} \u2192 {predicted}" for true, predicted, _, _ in pairs], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_title("confused most often (share of the true class)", fontsize=10)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def predictions_figure(images: Tensor, labels: Tensor, probabilities: Tensor, names: Sequence[str]) -> "Figure":
    """Draw images with the predicted class and its probability; wrong ones in red, with the true class.

    Args:
        images: Images (N, C, H, W) in [0, 1].
        labels: True classes (N,).
        probabilities: Probabilities (N, classes).
        names: Names of the classes.
    """
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.3 * columns, 1.6 * rows), layout="constrained")
    for position, (image, label, probability) in enumerate(zip(images, labels, probabilities, strict=True)):
        predicted = int(probability.argmax())
        right = predicted == int(label)
        axes = figure.add_subplot(rows, columns, position + 1)
        axes.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        title = _wrapped(names[predicted], after=f" ({probability[predicted]:.0%})")
        title += "" if right else f"\n{_wrapped(names[int(label)], before='is ')}"
        axes.set_title(title, fontsize=8, color="black" if right else "red")
        axes.set_axis_off()
    return figure


def iou_figure(iou: Tensor, names: Sequence[str]) -> "Figure":
    """Draw the intersection over union of each class as a bar, and their mean as a line.

    Args:
        iou: Intersection over union (classes,), NaN for classes without pixels.
        names: Names of the classes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 0.25 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(range(len(names)), iou.nan_to_num().numpy())
    axes.bar_label(bars, ["no pixels" if value.isnan() else f"{value:.3f}" for value in iou], padding=3, fontsize=8)
    axes.axvline(float(iou.nanmean()), color="black", linewidth=0.8, label=f"mean {iou.nanmean():.3f}")
    axes.set_yticks(range(len(names)), [_label(name) for name in names])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.1), xlabel="intersection over union")
    figure.legend(loc="outside upper right")
    return figure


def scenes_figure(scenes: Sequence[tuple[Tensor, Tensor, Tensor]], palette: Tensor, names: Sequence[str]) -> "Figure":
    """Draw images with their true and their predicted classes side by side; ignored pixels are black in both.

    Args:
        scenes: Image (C, H, W) in [0, 1], labels (H, W) and predicted classes (H, W) of each.
        palette: From `knlightning.callbacks.label_maps.palette_of`.
        names: Names of the classes, for the legend, which has those that are shown.
    """
    from matplotlib.figure import Figure

    height, width = scenes[0][1].shape
    found: set[int] = set()
    figure = Figure(figsize=(10, 0.8 + 3.2 * height / width * len(scenes)), layout="constrained")
    all_axes = figure.subplots(len(scenes), 3, squeeze=False)
    for row, (image, labels, predicted) in zip(all_axes, scenes, strict=True):
        counted = (labels >= 0) & (labels < len(palette) - 1)
        maps = (labels.long().where(counted, len(names)), predicted.where(counted, len(names)))
        found.update(*(part.unique().tolist() for part in maps))
        pictures = (image.permute(1, 2, 0).squeeze(-1), *(coloured(part, palette) for part in maps))
        for axes, picture in zip(row, pictures, strict=True):
            axes.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_axis_off()
    for axes, title in zip(all_axes[0], ("image", "truth", "prediction"), strict=True):
        axes.set_title(title, fontsize=9)
    add_legend(figure, palette, [_label(name) for name in names], found)
    return figure
