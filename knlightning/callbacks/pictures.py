"""Pictures of the validation in TensorBoard."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NAMED_CLASSES = 25
"""More classes than that are not named at the axes of the confusion matrix, nor counted in its cells."""


class Pictures(Callback):
    """Draw the confusion matrix and a page of predictions after validation, for TensorBoard.

    Needs a task whose validation step returns the logits (N, classes), and batches (images, labels). Names of the
    classes (`class_names`) and the way back from scaled images (`displayable`) are taken from the datamodule where
    it has them.

    Args:
        every_n_epochs: epochs between two drawings; the last epoch is always drawn. 0 for none at all.
        images: number of images on the page.

    Raises:
        ValueError: if an argument is negative.
    """

    def __init__(self, every_n_epochs: int = 5, images: int = 24) -> None:
        if every_n_epochs < 0 or images < 0:
            raise ValueError(
                f"pictures: every_n_epochs and images must be at least 0, got {every_n_epochs} and {images}"
            )
        self.every_n_epochs = every_n_epochs
        self.images = images
        self._confusion: MulticlassConfusionMatrix | None = None
        self._page: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last drawing."""
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
        """Count the predictions, and keep the first images."""
        if not self._due(trainer) or not isinstance(outputs, Tensor) or outputs.ndim != 2:
            return
        images, labels = batch
        if self._confusion is None:
            self._confusion = MulticlassConfusionMatrix(outputs.shape[1]).to(outputs.device)
        self._confusion.update(outputs, labels)
        missing = self.images - sum(len(kept) for kept, _, _ in self._page)
        if missing > 0:
            probabilities = outputs[:missing].float().softmax(dim=1)
            self._page.append((images[:missing].cpu(), labels[:missing].cpu(), probabilities.cpu()))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        if self._confusion is None:
            return
        counts = self._confusion.compute().cpu()  # a sum over the devices, so asked of each
        writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not trainer.is_global_zero or not writers:
            return
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        names = getattr(datamodule, "class_names", None) or [str(k) for k in range(len(counts))]
        figures = {"val/confusion": confusion_figure(counts, names)}
        if self._page:
            images, labels, probabilities = (torch.cat(part) for part in zip(*self._page, strict=True))
            displayable = getattr(datamodule, "displayable", _stretched)
            figures["val/predictions"] = predictions_figure(displayable(images), labels, probabilities, names)
        for writer in writers:
            for tag, figure in figures.items():
                writer.add_figure(tag, figure, trainer.global_step - 1)  # the step of the validation's metrics

    def _due(self, trainer: Trainer) -> bool:
        if not self.every_n_epochs or trainer.sanity_checking or trainer.state.fn != "fit":
            return False
        done = trainer.current_epoch + 1
        return done % self.every_n_epochs == 0 or done == trainer.max_epochs


def confusion_figure(counts: Tensor, names: Sequence[str]) -> "Figure":
    """Draw a confusion matrix.

    Args:
        counts: (classes, classes), rows are the true classes.
        names: of the classes.
    """
    from matplotlib.figure import Figure  # slow to import, and not needed by `knl --help`

    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot()
    figure.colorbar(axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1), label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true")
    if len(names) <= MOST_NAMED_CLASSES:
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        for row, column in counts.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            count = int(counts[row, column])
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    return figure


def predictions_figure(images: Tensor, labels: Tensor, probabilities: Tensor, names: Sequence[str]) -> "Figure":
    """Draw images with the class and the probability they were given, the wrong ones in red with the true class.

    Args:
        images: (N, C, H, W) in [0, 1].
        labels: (N,).
        probabilities: (N, classes).
        names: of the classes.
    """
    from matplotlib.figure import Figure

    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.3 * columns, 1.6 * rows), layout="constrained")
    for position, (image, label, probability) in enumerate(zip(images, labels, probabilities, strict=True)):
        predicted = int(probability.argmax())
        right = predicted == int(label)
        axes = figure.add_subplot(rows, columns, position + 1)
        axes.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        title = f"{names[predicted]} ({probability[predicted]:.0%})" + ("" if right else f"\nis {names[int(label)]}")
        axes.set_title(title, fontsize=8, color="black" if right else "red")
        axes.set_axis_off()
    return figure


def _stretched(images: Tensor) -> Tensor:
    """Bring images of an unknown scaling to [0, 1], each by itself."""
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    return (images - low) / (high - low).clamp(min=1e-12)
