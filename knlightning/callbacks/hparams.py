"""Log of TensorBoard, and its HPARAMS tab with the best score."""

import inspect
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from knlightning.callbacks.checkpoints import BestCheckpoint
from knlightning.callbacks.harmless import Harmless
from knlightning.text import printable

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


BY_IMAGES = "versus_images"
"""Folder and group of the metrics whose steps are the training images seen."""


class TensorBoardLog(TensorBoardLogger):
    """Write events of TensorBoard into the run directory itself.

    The groups of metrics begin with `train` and `val`; learning rates are in `train`. Once it is told how many images
    were seen, it writes these two groups a second time, by images in place of optimizer steps, as a run of its own:
    so runs with batches of other sizes can be compared.

    Args:
        directory: The run directory.
        first_step: Optimizer step at which the run starts or resumes. Events from that step on, which an interrupted
            run has left, are hidden: these steps are trained again.
    """

    def __init__(self, directory: str | os.PathLike[str], first_step: int = 0) -> None:
        purge = first_step if first_step > 0 else None
        super().__init__(os.fspath(directory), name="", version="", default_hp_metric=False, purge_step=purge)
        self._harmless = Harmless()
        self._images = 0
        self._by_images: SummaryWriter | None = None

    @rank_zero_only
    def count_images(self, images: int) -> None:
        """Say how many training images were seen so far; the first time where the run starts or resumes."""
        with self._harmless("the log of TensorBoard by images"):
            if self._by_images is None:
                from torch.utils.tensorboard import SummaryWriter  # slow to import

                self._by_images = SummaryWriter(os.path.join(self.root_dir, BY_IMAGES), purge_step=images + 1)
            self._images = images

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write metrics; what cannot be written never ends a run."""
        named = {f"train/{key}" if key.startswith("lr-") else key: metrics[key] for key in metrics if key != "epoch"}
        with self._harmless("the log of TensorBoard"):
            super().log_metrics(named, step)
            for name, value in named.items():
                if self._by_images is not None and name.startswith(("train/", "val/")):
                    self._by_images.add_scalar(f"{BY_IMAGES}/{name}", value, self._images)

    @rank_zero_only
    def log_hyperparams(self, params: Any, metrics: Mapping[str, float] | None = None, step: int | None = None) -> None:
        """Write hyperparameters with a score; what cannot be written never ends a run.

        Without a summary of the experiment, which Lightning's logger writes too, TensorBoard compares the runs itself,
        and shows first what differs between them.
        """
        if metrics is None:
            return
        with self._harmless("the hyperparameters in TensorBoard"):
            from torch.utils.tensorboard.summary import hparams  # slow to import

            _, *summaries = hparams(dict(params), {})
            self.log_metrics(metrics, step)
            for summary in summaries:
                self.experiment.file_writer.add_summary(summary)

    def save(self) -> None:
        """Write the events to the disk; not the `hparams.yaml` of the parent, whose content is in `config.yaml`."""
        self.experiment.flush()
        if self._by_images is not None:
            self._by_images.flush()


class HParams(Callback):
    """Log the hyperparameters with the best score so far, whenever there is a better one."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config  # a finder may change it before training starts
        self._logged: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the hyperparameters to the other loggers, which need no score."""
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(readable(self.config))

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
                            stage, slash, name = str(callback.monitor).rpartition("/")
                            metrics = {f"{stage}{slash}best_{name}": score}
                            logger.log_hyperparams(readable(self.config), metrics, trainer.global_step - 1)


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
