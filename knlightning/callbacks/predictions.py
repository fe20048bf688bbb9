"""Predictions as files: a table for images with a class each, pictures for images with a class for each pixel."""

import csv
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor

from knlightning.callbacks.contact_sheet import ContactSheet
from knlightning.callbacks.label_maps import coloured, palette_of
from knlightning.checks import check_number
from knlightning.internals.torchvision import IMG_EXTENSIONS
from knlightning.protocols import DataDescription, data_of, describe
from knlightning.run_directory import replacing, replacing_folder
from knlightning.tasks.grad_cam import grad_cam, highlighted
from knlightning.text import cell

PARTIAL = "predictions.partial"
"""Folder of the pictures until all of them are there."""


class PredictionWriter(Callback):
    r"""Write predictions into the run directory.

    If the predict step of the task returns probabilities (N, classes), they go to `predictions.csv`: file, class and
    probability, then the next most probable classes. If it returns classes (N, H, W), each image gets a PNG in each of
    three folders in `predictions`: `colours` shows the classes in their colours, `overlays` the same over the image,
    and `label_ids` holds their numbers, as a benchmark server reads them. A picture has the same path in these folders
    as its image in `predict_dir`, with `.png` appended if the image has another format. In both cases
    `predictions.html` shows the first images with what is predicted.

    The table is UTF-8; bytes of a path that are not, and control characters, are written as escapes such as `\udce9`. A
    cell that begins with `=`, `+`, `-` or `@` gets a `'` before it, so that no spreadsheet takes it for a
    formula. Rows are written as they come, into `predictions.partial.csv` (`predictions.partial-1.csv`, ... on further
    devices). At the end they are sorted, written into `predictions.csv`, and the first file goes. Likewise pictures
    come into `predictions.partial`, which takes the place of an earlier `predictions` as a whole. After an error what
    is partial stays, with what was predicted until then.

    Batches must be (images, paths). What is known of the data (`knlightning.protocols.DataDescription`: names,
    colours and numbers of the classes, `predict_dir`, how to undo the scaling) comes from the datamodule.

    Args:
        top_k: Number of classes in the table for each image, at least 1; all of them if there are fewer.
        grad_cam: Whether `predictions.html` darkens the parts of an image that say little for the predicted class, see
            `knlightning.tasks.grad_cam`. Not for a class of each pixel.

    Attributes:
        directory: Where to write; None for the run directory.
        path: The file, or the folder, that was written last; None before.
        partial: The file with the rows, or the folder with the pictures, that came so far; None if there is none.
        rows: The number of images in it.

    Raises:
        ArgumentError: If top_k is below 1.
    """

    def __init__(self, top_k: int = 5, grad_cam: bool = False) -> None:
        check_number("top_k", top_k, at_least=1, integer=True)
        self.top_k = top_k
        self.grad_cam = grad_cam
        self.directory: Path | None = None
        self.path: Path | None = None
        self.partial: Path | None = None
        self.rows = 0
        self._rows: list[list[str]] = []
        self._sheet = ContactSheet()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new page of images, and a new folder of pictures."""
        self._sheet = ContactSheet()
        if trainer.is_global_zero:  # of a run that an error has ended
            shutil.rmtree(self._root(trainer) / PARTIAL, ignore_errors=True)
        trainer.strategy.barrier()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the most probable classes of each image, or write its pictures."""
        data = data_of(trainer)
        images, names = batch
        if outputs.ndim == 3:
            self.partial = self._root(trainer) / PARTIAL
            for name, image, label_map in zip(names, data.displayable(images), outputs.cpu(), strict=True):
                relative = relative_path(name, data.predict_dir)
                overlay = write_pictures(self.partial, relative, image.cpu(), label_map, data)
                self._sheet.add(str(relative), overlay, num_classes=classes_of(data, label_map))
                self._rows.append([name])
            return
        classes = data.names(outputs.shape[1])
        top = outputs.topk(min(self.top_k, outputs.shape[1]))
        rows = []
        for name, values, indices in zip(names, top.values.tolist(), top.indices.tolist(), strict=True):
            row = [name]
            for value, index in zip(values, indices, strict=True):
                row += [classes[index], f"{value:.6f}"]
            rows.append(row)
        self._append(trainer, rows)
        self._rows += rows
        if images.ndim != 4 or not rows or self._sheet.full:
            return
        shown = data.displayable(images)
        if self.grad_cam:
            shown = highlighted(shown, grad_cam(pl_module, images, top.indices[:, 0]))
        for row, image in zip(rows, shown, strict=True):
            best = [(row[k], float(row[k + 1])) for k in range(1, len(row), 2)]
            self._sheet.add(str(relative_path(row[0], data.predict_dir)), image, best)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say where the rows are that came before an error."""
        rows, self._rows = self._rows, []
        if self.partial is not None:
            rank_zero_warn(f"The predictions stopped after {len(rows)} images, which are in {self.partial}.")
            self.partial = None

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the images of all devices, and write the table, sorted by file."""
        rows, self._rows = self._rows, []
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, (rows, self._sheet.cards))
            rows = [row for part, _ in parts for row in part]
            self._sheet.cards = {name: card for _, cards in parts for name, card in cards.items()}
        self.rows = len(rows)
        root = self._root(trainer)
        if trainer.is_global_zero and self._sheet.cards:
            self._sheet.write(root / "predictions.html", len(rows), data_of(trainer))
        if rows and len(rows[0]) == 1:
            self.path, self.partial = root / "predictions", None
            if trainer.is_global_zero:
                with replacing_folder(self.path) as temporary:
                    (root / PARTIAL).rename(temporary)
            return
        self.path = root / "predictions.csv"
        if trainer.is_global_zero:
            with replacing(self.path) as temporary:
                _write(temporary, [_header(rows), *sorted(rows)])
        if self.partial is not None:
            self.partial.unlink()
            self.partial = None

    def _append(self, trainer: Trainer, rows: list[list[str]]) -> None:
        if self.partial is None:
            rank = f"-{trainer.global_rank}" if trainer.global_rank else ""
            self.partial = self._root(trainer) / f"predictions.partial{rank}.csv"
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            _write(self.partial, [_header(rows)])
        _write(self.partial, rows, "a")

    def _root(self, trainer: Trainer) -> Path:
        return self.directory or Path(trainer.default_root_dir)


def _header(rows: list[list[str]]) -> list[str]:
    header = ["file", "class", "probability"]
    for k in range(2, (max(map(len, rows), default=3) - 1) // 2 + 1):
        header += [f"class_{k}", f"probability_{k}"]
    return header


def _write(path: Path, rows: list[list[str]], mode: Literal["w", "a"] = "w") -> None:
    with path.open(mode, newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([cell(text) for text in row] for row in rows)


def write_pictures(root: Path, name: Path, image: Tensor, label_map: Tensor, datamodule: object) -> Tensor:
    """Write the classes of an image as `ROOT/{colours,overlays,label_ids}/NAME`.

    Args:
        root: The folder.
        name: Path of the image in the folder that it comes from.
        image: Image (C, H, W) in [0, 1], C = 1 or 3.
        label_map: Classes (H, W), integers.
        datamodule: Its `palette` and `label_ids` are used if it has them. A description of the data will do.

    Returns:
        The overlay, uint8 (3, H, W).
    """
    data = describe(datamodule)
    colours = coloured(label_map, palette_of(data, classes_of(data, label_map)))
    pixels = (image.expand(3, -1, -1).permute(1, 2, 0) * 255).round().clamp(0, 255)
    overlay = (0.5 * pixels + 0.5 * colours).round()
    numbers = torch.tensor(data.label_ids)[label_map] if data.label_ids is not None else label_map
    small = int(numbers.max()) < 256
    pictures = {
        "colours": colours.numpy(),
        "overlays": overlay.numpy().astype(np.uint8),
        "label_ids": numbers.numpy().astype(np.uint8 if small else np.uint16),
    }
    for folder, picture in pictures.items():
        with replacing(root / folder / png_name(name)) as temporary:
            Image.fromarray(picture).save(temporary, "PNG")
    return torch.from_numpy(pictures["overlays"]).permute(2, 0, 1)


def classes_of(data: DataDescription, label_map: Tensor) -> int:
    """Return the number of classes that have a colour."""
    return len(data.palette or data.label_ids or ()) or int(label_map.max()) + 1


def relative_path(path: str, folder: Path | None) -> Path:
    """Return the path of an image relative to a folder, or to the root of the file system if it lies elsewhere.

    Args:
        path: Path of the image.
        folder: The folder, or the file, that is predicted; None if it is not known.
    """
    absolute = Path(os.path.abspath(path))
    if folder is not None and folder.is_file():
        folder = folder.parent
    if folder is not None and absolute.is_relative_to(os.path.abspath(folder)):
        return absolute.relative_to(os.path.abspath(folder))
    return absolute.relative_to(absolute.anchor)


def png_name(path: Path) -> Path:
    """Name the picture of an image so that no two images in a folder get the same name.

    `.png` is appended unless the image is a PNG. It is appended to a PNG too if its name could be that of the picture
    of another image, such as `a.jpg.png`.
    """
    is_png = path.suffix.lower() == ".png"
    return (
        path if is_png and Path(path.stem).suffix.lower() not in IMG_EXTENSIONS else path.with_name(f"{path.name}.png")
    )
