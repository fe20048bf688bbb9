"""Predictions as a table."""

import csv
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer

from knlightning.run_directory import replacing


class PredictionWriter(Callback):
    """Write `predictions.csv` into the run directory: file, class and probability, then the next likeliest classes.

    Needs a task whose predict step returns probabilities (N, classes), and batches (images, names).

    Args:
        top_k: number of classes named for each image; all of them if there are fewer.

    Attributes:
        path: the file written last; None before.
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
        """Keep the likeliest classes of each image."""
        classes: Any = getattr(trainer.datamodule, "class_names", None)  # type: ignore[attr-defined]
        top = outputs.topk(min(self.top_k, outputs.shape[1]))
        for name, values, indices in zip(batch[1], top.values.tolist(), top.indices.tolist(), strict=True):
            row = [name]
            for value, index in zip(values, indices, strict=True):
                row += [classes[index] if classes else str(index), f"{value:.6f}"]
            self._rows.append(row)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table of all devices, sorted by file."""
        rows, self._rows = self._rows, []
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, rows)
            rows = [row for part in parts for row in part]
        self.rows = len(rows)
        self.path = Path(trainer.default_root_dir) / "predictions.csv"
        if trainer.is_global_zero:
            header = ["file", "class", "probability"]
            for k in range(2, (max(map(len, rows), default=3) - 1) // 2 + 1):
                header += [f"class_{k}", f"probability_{k}"]
            with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
                csv.writer(file).writerows([header, *sorted(rows)])
