"""Log of TensorBoard, and its HPARAMS tab with the best score."""

import inspect
import os
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from knlightning.callbacks.checkpoints import BestCheckpoint
from knlightning.callbacks.harmless import Harmless
from knlightning.text import printable


class TensorBoardLog(TensorBoardLogger):
    """Write events of TensorBoard into the run directory itself.

    Args:
        directory: The run directory.
        first_step: Optimizer step at which the run starts or resumes. Events from that step on, which an interrupted
            run has left, are hidden: these steps are trained again.
    """

    def __init__(self, directory: str | os.PathLike[str], first_step: int = 0) -> None:
        purge = first_step if first_step > 0 else None
        super().__init__(os.fspath(directory), name="", version="", default_hp_metric=False, purge_step=purge)
        self._harmless = Harmless()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write metrics; what cannot be written never ends a run."""
        with self._harmless("the log of TensorBoard"):
            super().log_metrics(metrics, step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Write hyperparameters; what cannot be written never ends a run."""
        with self._harmless("the hyperparameters in TensorBoard"):
            super().log_hyperparams(*args, **kwargs)

    def save(self) -> None:
        """Write the events to the disk; not the `hparams.yaml` of the parent, whose content is in `config.yaml`."""
        self.experiment.flush()


class HParams(Callback):
    """Log the hyperparameters with the best score so far, whenever there is a better one.

    Args:
        config: Configuration of the run, as in `config.yaml`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.hparams = readable(config)
        self._logged: float | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the best score of the epochs before, as soon as their checkpoints are written."""
        self._log(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the best score of the run."""
        self._log(trainer)

    def _log(self, trainer: Trainer) -> None:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, BestCheckpoint) and callback.best_model_score is not None:
                score = float(callback.best_model_score)
                if score != self._logged:
                    self._logged = score
                    for logger in trainer.loggers:
                        if isinstance(logger, TensorBoardLogger):
                            metrics = {f"best/{callback.monitor}": score}
                            logger.log_hyperparams(self.hparams, metrics, trainer.global_step - 1)


def readable(config: dict[str, Any]) -> dict[str, str | float | bool]:
    """Flatten a configuration into short names and plain values.

    `model: {class_path: a.B, init_args: {lr: 1}}` becomes `{"model": "B", "model.lr": 1}`. Of the trainer, only what
    differs from Lightning's defaults is kept; what is null is left out everywhere.
    """
    defaults = inspect.signature(Trainer).parameters
    trainer = {k: v for k, v in config.get("trainer", {}).items() if k not in defaults or v != defaults[k].default}
    kept = {"seed": config.get("seed_everything"), "model": config.get("model"), "data": config.get("data")}
    flat: dict[str, str | float | bool] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict) and "class_path" in value:
            flat[name] = value["class_path"].rpartition(".")[2]
            add(name, value.get("init_args") or {})
        elif isinstance(value, dict):
            for key, inner in value.items():
                add(f"{name}.{key}" if name else key, inner)
        elif isinstance(value, (str, int, float, bool)):
            flat[name] = printable(value) if isinstance(value, str) else value
        elif value is not None:
            flat[name] = printable(str(value))

    add("", kept)
    for key in ("callbacks", "logger", "default_root_dir", "plugins"):
        trainer.pop(key, None)
    add("trainer", trainer)
    return flat
