"""Predictions as files: a table for images with a class each, pictures for images with a class for each pixel."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from knlightning.callbacks.label_maps import coloured, palette_of, stretched
from knlightning.run_directory import replacing


class PredictionWriter(Callback):
    """Write what is predicted into the run directory.

    Of a task whose predict step returns probabilities (N, classes), `predictions.csv`: file, class and probability,
    then the next likeliest classes. Of one whose predict step returns classes (N, H, W), a PNG for each image in
    each of three folders in `predictions`: in `colours` the classes in their colours, in `overlays` these over the
    image, and in `label_ids` their numbers, as a benchmark server reads them. A picture lies in these folders as its
    image does in the folder that is predicted, and has its name, with `.png` after it if it is another format's.

    Batches are (images, paths). Names, colours and numbers of the classes (`class_names`, `palette`, `label_ids`),
    the folder (`predict_dir`) and the way back from scaled images (`displayable`) are taken from the datamodule where
    it has them.

    Args:
        top_k: number of classes named in the table for each image; all of them if there are fewer.

    Attributes:
        path: the file, or the folder, written last; None before.
        rows: how many images it has.

    Raises:
        ValueError: if top_k is below 1.
    """

    def __init__(self, top_k: int = 5) -> None:
        if top_k < 1:
            raise ValueError(f"predictions.top_k must be at least 1, got {top_k}")
        self.top_k = top_k
        self.path: Path | None = None
        self.rows = 0
        self._rows: list[list[str]] = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the likeliest classes of each image, or write its pictures."""
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        images, names = batch
        if outputs.ndim == 3:
            root = Path(trainer.default_root_dir) / "predictions"
            displayable = getattr(datamodule, "displayable", stretched)
            for name, image, label_map in zip(names, displayable(images), outputs.cpu(), strict=True):
                write_pictures(root, inside(name, datamodule), image.cpu(), label_map, datamodule)
                self._rows.append([name])
            return
        classes: Any = getattr(datamodule, "class_names", None)
        top = outputs.topk(min(self.top_k, outputs.shape[1]))
        for name, values, indices in zip(names, top.values.tolist(), top.indices.tolist(), strict=True):
            row = [name]
            for value, index in zip(values, indices, strict=True):
                row += [classes[index] if classes else str(index), f"{value:.6f}"]
            self._rows.append(row)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the images of all devices, and write the table, sorted by file."""
        rows, self._rows = self._rows, []
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, rows)
            rows = [row for part in parts for row in part]
        self.rows = len(rows)
        if rows and len(rows[0]) == 1:  # pictures, which are there already
            self.path = Path(trainer.default_root_dir) / "predictions"
            return
        self.path = Path(trainer.default_root_dir) / "predictions.csv"
        if trainer.is_global_zero:
            header = ["file", "class", "probability"]
            for k in range(2, (max(map(len, rows), default=3) - 1) // 2 + 1):
                header += [f"class_{k}", f"probability_{k}"]
            with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
                csv.writer(file).writerows([header, *sorted(rows)])


def write_pictures(root: Path, name: Path, image: Tensor, label_map: Tensor, datamodule: Any) -> None:
    """Write the classes of an image as `ROOT/{colours,overlays,label_ids}/NAME`.

    Args:
        root: the folder.
        name: path of the image in the folder that it comes from.
        image: (C, H, W) in [0, 1], C = 1 or 3.
        label_map: (H, W), integers.
        datamodule: whose `palette` and `label_ids` are used, where it has them.
    """
    given: Sequence[tuple[int, int, int]] | None = getattr(datamodule, "palette", None)
    ids: Sequence[int] | None = getattr(datamodule, "label_ids", None)
    classes = len(given or ids or ()) or int(label_map.max()) + 1
    colours = coloured(label_map, palette_of(datamodule, classes))
    pixels = (image.expand(3, -1, -1).permute(1, 2, 0) * 255).round().clamp(0, 255)
    overlay = (0.5 * pixels + 0.5 * colours).round()
    numbers = torch.tensor(ids)[label_map] if ids else label_map
    small = int(numbers.max()) < 256
    pictures = {
        "colours": colours.numpy(),
        "overlays": overlay.numpy().astype(np.uint8),
        "label_ids": numbers.numpy().astype(np.uint8 if small else np.uint16),
    }
    for folder, picture in pictures.items():
        with replacing(root / folder / png_name(name)) as temporary:
            Image.fromarray(picture).save(temporary, "PNG")


def inside(path: str, datamodule: Any) -> Path:
    """Return the path of an image in the folder that is predicted, or where that is not known, from the root."""
    absolute = Path(os.path.abspath(path))
    folder = getattr(datamodule, "predict_dir", None)
    if folder is not None and absolute.is_relative_to(os.path.abspath(folder)):
        return absolute.relative_to(os.path.abspath(folder))
    return absolute.relative_to(absolute.anchor)


def png_name(path: Path) -> Path:
    """Name the picture of an image, so that no two images in a folder have the same.

    The suffix `.png` is put after a name unless it is a PNG's already; after that of a PNG too which looks like the
    picture of another image, as `a.jpg.png` does.
    """
    is_png = path.suffix.lower() == ".png"
    return (
        path if is_png and Path(path.stem).suffix.lower() not in IMG_EXTENSIONS else path.with_name(f"{path.name}.png")
    )
