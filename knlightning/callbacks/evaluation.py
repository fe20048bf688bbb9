"""What an evaluation leaves: scores, tables, pictures and the worst mistakes, as files."""

import csv
import json
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import RandomSampler
from torchmetrics.classification import MulticlassConfusionMatrix

from knlightning import __version__
from knlightning.callbacks.calibration import Reliability, expected_calibration_error, reliability_figure
from knlightning.callbacks.harmless import Harmless
from knlightning.callbacks.mistakes import Mistake, WorstMistakes, mistakes_gallery, side_by_side, small
from knlightning.callbacks.pictures import MOST_CLASSES, confusion_figure
from knlightning.callbacks.scores import scores_of_classes
from knlightning.pages import page
from knlightning.protocols import DataDescription, data_of
from knlightning.run_directory import replacing_folder
from knlightning.tasks.segmentation import class_scores, is_of_pixels
from knlightning.text import cell, counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class EvaluationFiles(Callback):
    """Write what `trainer.validate` or `trainer.test` finds into a folder, which is replaced as a whole.

    | file | content |
    | --- | --- |
    | `test.json`, `validate.json` | scores, expected calibration error, checkpoint, data, versions |
    | `classes.csv` | precision, recall, F1 and support of each class; for segmentation the IoU too |
    | `confusion.csv`, `confusion.png` | numbers by true class (rows) and predicted class (columns) |
    | `reliability.png` | accuracy by the probability of the predicted class |
    | `predictions.csv` | label and most probable classes of each image; for segmentation its scores |
    | `mistakes.html` | the images that the network is most wrong about |

    The step of the task must return the logits (N, classes), or for segmentation
    `knlightning.tasks.segmentation.PixelPredictions`, and batches must be (images, labels). Otherwise there are the
    scores alone. Of several loaders, the first counts. No table of classes, and no confusion matrix, is made of more
    than 2000 classes. A value that is not defined, such as the precision of a class that is never predicted, is an
    empty cell. `predictions.csv` names the file of an image if the dataset has a method `path_of` of its place, which
    it names otherwise; rows are in the order of the dataset.

    Args:
        directory: The folder.
        top_k: Number of classes in the table for each image.
        mistakes: Number of images on the page of mistakes.
    """

    _confusion: MulticlassConfusionMatrix | None
    _reliability: Reliability
    _worst: WorstMistakes
    _rows: list[tuple[Tensor, ...]]

    def __init__(self, directory: Path, top_k: int = 5, mistakes: int = 24) -> None:
        self.directory = directory
        self.top_k = top_k
        self.mistakes = mistakes
        self._checkpoint: dict[str, Any] | None = None
        self._harmless = Harmless()
        self._forget()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note which checkpoint is evaluated."""
        step = {"epoch": checkpoint["epoch"], "global_step": checkpoint["global_step"]}
        self._checkpoint = {"path": str(trainer.ckpt_path), **step}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._forget()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the predictions of a batch, and keep the worst."""
        of_pixels = is_of_pixels(outputs)
        if dataloader_idx or not (of_pixels or (isinstance(outputs, Tensor) and outputs.ndim == 2)):
            return
        images, labels = batch  # also a batch of none, which a device has that gets no images: the sums need each
        data = data_of(trainer)
        self._num_classes = outputs["num_classes"] if of_pixels else outputs.shape[1]
        if self._confusion is None and self._num_classes <= MOST_CLASSES:
            ignored = getattr(pl_module, "ignore_index", None)
            # not validated: the task checks the labels
            made = MulticlassConfusionMatrix(self._num_classes, ignore_index=ignored, validate_args=False)
            self._confusion = made.to(labels.device)
        counted = (labels >= 0) & (labels < self._num_classes)
        if of_pixels:
            predicted, confidence = outputs["classes"], outputs["probabilities"]
            self._add_scenes(images, labels, predicted, counted, data)
        else:
            logits = outputs.float()
            top, normalizer = logits.topk(min(self.top_k, self._num_classes)), logits.logsumexp(dim=1, keepdim=True)
            probabilities = (top.values - normalizer).exp()
            predicted, confidence = top.indices[:, 0], probabilities[:, 0]
            of_label = (logits.gather(1, labels[:, None]) - normalizer).exp()[:, 0]
            self._add_images(images, labels, top.indices, probabilities, of_label, data)
        if self._confusion is not None:
            self._confusion.update(predicted, labels)
        self._reliability.to(labels.device)
        self._reliability.update(confidence[counted], (predicted == labels)[counted])

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files."""
        self._write(trainer, pl_module, "validate", trainer.val_dataloaders)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files."""
        self._write(trainer, pl_module, "test", trainer.test_dataloaders)

    def _forget(self) -> None:
        self._num_classes = 0
        self._confusion = None
        self._reliability = Reliability()
        self._worst = WorstMistakes(self.mistakes)
        self._rows = []
        self._seen = 0

    def _add_images(
        self,
        images: Tensor,
        labels: Tensor,
        classes: Tensor,
        probabilities: Tensor,
        of_label: Tensor,
        data: DataDescription,
    ) -> None:
        """Keep the labels and the most probable classes of images, and the worst mistakes."""
        wrong = classes[:, 0] != labels
        mistakes = []
        for i in self._worst.candidates(probabilities[:, 0] * wrong):
            label = int(labels[i])
            shown = dict(zip(classes[i, :2].tolist(), probabilities[i, :2].tolist(), strict=True))
            shown.setdefault(label, float(of_label[i]))
            image = small(data.displayable(images[i : i + 1])[0])
            first = float(probabilities[i, 0])
            mistakes.append(Mistake(first, self._seen + i, image, label, list(shown), list(shown.values())))
        self._worst.add(mistakes)
        self._rows.append(tuple(part.cpu() for part in (labels, of_label, classes, probabilities)))
        self._seen += len(labels)

    def _add_scenes(
        self, images: Tensor, labels: Tensor, predicted: Tensor, counted: Tensor, data: DataDescription
    ) -> None:
        """Keep the scores of images with a class for each pixel, and the worst of them."""
        if not len(labels):
            return
        number = self._num_classes
        scores = []
        for i in range(len(labels)):
            pairs = labels[i][counted[i]].long() * number + predicted[i][counted[i]]
            scores.append(class_scores(torch.bincount(pairs, minlength=number**2).view(number, number)))
        accuracy = torch.stack([score["pixel_acc"] for score in scores]).cpu()
        wrong = (1 - accuracy).nan_to_num()
        mistakes = []
        for i in self._worst.candidates(wrong):
            image = data.displayable(images[i : i + 1])[0]
            drawn = side_by_side(image, labels[i], predicted[i], data, number)
            mistakes.append(Mistake(float(wrong[i]), self._seen + i, drawn))
        self._worst.add(mistakes)
        miou = torch.stack([score["miou"] for score in scores]).cpu()
        self._rows.append((counted.flatten(1).sum(dim=1).cpu(), accuracy, miou))
        self._seen += len(labels)

    def _write(self, trainer: Trainer, pl_module: LightningModule, stage: str, loaders: Any) -> None:
        """Bring together what all devices have seen, and write it."""
        names = _names_of_images(loaders[0] if isinstance(loaders, list) else loaders, self._seen)
        rows = [torch.cat(part).tolist() for part in zip(*self._rows, strict=True)]
        table = list(zip(names, *rows, strict=True))
        worst = [(names[mistake.place][1], mistake) for mistake in self._worst.kept]
        # sums over the devices, so asked of each
        confusion = None if self._confusion is None else self._confusion.compute().cpu()
        reliability = [part.cpu() for part in self._reliability.compute()] if self._num_classes else []
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, (table, worst))
            table = [row for part, _ in parts for row in part]
            worst = sorted((each for _, part in parts for each in part), key=lambda each: -each[1].badness)
        if not trainer.is_global_zero:
            return
        data = data_of(trainer)
        report = self._report(trainer, pl_module, stage, len(table), confusion)
        with replacing_folder(self.directory) as folder:
            if table:
                classes = data.names(self._num_classes)
                report["expected_calibration_error"] = expected_calibration_error(*reliability)
                _write_table(folder / "predictions.csv", _predictions(sorted(table, key=lambda row: row[0]), classes))
                body = mistakes_gallery(worst[: self.mistakes], classes, data)
                title = f"Worst mistakes on {counted(len(table), 'image')}"
                (folder / "mistakes.html").write_text(page(title, f"<h1>{title}</h1>\n{body}"), encoding="utf-8")
                self._save(folder / "reliability.png", lambda: reliability_figure(*reliability))
                if confusion is not None:
                    _write_table(folder / "classes.csv", _classes(confusion, classes, len(rows) == 3))
                    counts = ([name, *row] for name, row in zip(classes, confusion.tolist(), strict=True))
                    _write_table(folder / "confusion.csv", [["true", *classes], *counts])
                    self._save(folder / "confusion.png", lambda: confusion_figure(confusion, classes))
            (folder / f"{stage}.json").write_text(json.dumps(report, indent=1, ensure_ascii=False, default=str) + "\n")

    def _report(
        self, trainer: Trainer, pl_module: LightningModule, stage: str, images: int, confusion: Tensor | None
    ) -> dict[str, Any]:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined] # set where mypy does not look
        data = data_of(trainer)
        kinds = {"data": datamodule, "task": pl_module, "network": getattr(pl_module, "backbone", None)}
        named = {key: f"{type(thing).__module__}.{type(thing).__qualname__}" for key, thing in kinds.items() if thing}
        report: dict[str, Any] = {
            "scores": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "images": images,
            "checkpoint": self._checkpoint,
            **named,
            "data_arguments": dict(data.hparams or {}),
            "classes": None if data.class_names is None else list(data.class_names),
            "versions": {"knlightning": __version__, "lightning": lightning.__version__, "torch": torch.__version__},
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if confusion is not None:
            of_classes = scores_of_classes(confusion)
            means = {
                f"{name}_mean": float(getattr(of_classes, name).nanmean()) for name in ("precision", "recall", "f1")
            }
            report["scores"] |= {f"{stage.removesuffix('idate')}/{name}": value for name, value in means.items()}
        return report

    def _save(self, path: Path, draw: Any) -> None:
        """Draw a picture; what cannot be drawn is left out, with a warning."""
        with self._harmless(f"the picture {path.name}"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # a box stands for it
            figure: Figure = draw()
            figure.savefig(path, dpi=150)


def _names_of_images(loader: Any, number: int) -> list[tuple[int, str]]:
    """Return place in the dataset and name of each image that a loader has given in this process."""
    sampler, dataset = getattr(loader, "sampler", None), getattr(loader, "dataset", None)
    order: list[int] = []
    if sampler is not None and not isinstance(sampler, RandomSampler):
        damaged = getattr(dataset, "damaged", None)  # files that could not be read, and gave no image
        order = [index for index in sampler if damaged is None or not damaged[index]]
    if len(order) < number:
        order = list(range(number))
        dataset = None
    name_of: Callable[[int], str] = getattr(dataset, "path_of", str)
    return [(index, name_of(index)) for index in order[:number]]


def _predictions(table: Sequence[tuple[Any, ...]], names: Sequence[str]) -> list[list[Any]]:
    """Make the table of images, of what was kept of each."""
    if len(table[0]) == 4:  # segmentation
        rows = [[name, pixels, f"{acc:.6f}", f"{miou:.6f}"] for (_, name), pixels, acc, miou in table]
        return [["image", "labelled_pixels", "pixel_acc", "miou"], *rows]
    header = ["image", "label", "probability_of_label", "class", "probability"]
    for k in range(2, len(table[0][3]) + 1):
        header += [f"class_{k}", f"probability_{k}"]
    rows = []
    for (_, image), label, of_label, classes, probabilities in table:
        row = [image, names[label], f"{of_label:.6f}"]
        for number, probability in zip(classes, probabilities, strict=True):
            row += [names[number], f"{probability:.6f}"]
        rows.append(row)
    return [header, *rows]


def _classes(confusion: Tensor, names: Sequence[str], of_pixels: bool) -> list[list[Any]]:
    """Make the table of classes."""
    scores = scores_of_classes(confusion)
    columns = ["precision", "recall", "f1", *(["iou"] if of_pixels else [])]
    parts = [["" if value != value else f"{value:.6f}" for value in getattr(scores, name).tolist()] for name in columns]
    rows = zip(names, *parts, scores.support.tolist(), strict=True)
    return [["class", *columns, "support"], *map(list, rows)]


def _write_table(path: Path, rows: list[list[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([cell(str(value)) for value in row] for row in rows)
