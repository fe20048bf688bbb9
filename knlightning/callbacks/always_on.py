"""The callbacks that every run has, in their order. A new one needs its own file and a line here.

Hooks are called in this order:

1. those of `made_for_every_run`;
2. those of `trainer.callbacks` in the configuration;
3. those of `CONFIGURED`; of these Lightning moves the checkpoints to the end, after all other callbacks, so that they
   store what the others have done in the same hook.
"""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar

from knlightning.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from knlightning.callbacks.hparams import HParams
from knlightning.callbacks.pictures import Pictures
from knlightning.callbacks.predictions import PredictionWriter
from knlightning.callbacks.progress import Progress
from knlightning.callbacks.run_config import RunConfig
from knlightning.callbacks.seeding import Seeding
from knlightning.callbacks.summary import Summary
from knlightning.callbacks.throughput import Throughput

CONFIGURED: dict[str, tuple[type[Callback], str]] = {
    "best_checkpoint": (BestCheckpoint, "What is kept as checkpoints/best.ckpt"),
    # after best_checkpoint, since it stores the best score
    "last_checkpoint": (LastCheckpoint, "When checkpoints/last.ckpt is written; always at the end of an epoch"),
    "pictures": (Pictures, "Confusion matrix and example predictions in TensorBoard"),
    "predictions": (PredictionWriter, "What knl predict writes"),
}
"""The callbacks with arguments in the configuration: by their key, the class and its title in the help."""


def made_for_every_run(
    text: str, config: dict[str, Any], has_logger: bool, configured: Sequence[Callback] = ()
) -> list[Callback]:
    """Make the callbacks without arguments in the configuration.

    Args:
        text: Configuration of the run in YAML.
        config: The same as plain values.
        has_logger: Whether the run logs anything.
        configured: The callbacks of `trainer.callbacks`; a progress bar among them takes the place of ours.
    """
    shows_progress = config["trainer"].get("enable_progress_bar") is not False
    own_bar = any(isinstance(callback, ProgressBar) for callback in configured)
    return [
        Seeding(),  # first: any other callback may draw random numbers, and they must be those of the batch
        RunConfig(text, config),  # config.yaml is there before anything else is written
        Throughput(),
        *([Summary(config)] if shows_progress else []),
        *([Progress()] if shows_progress and not own_bar else []),  # after what measures the speed it shows
        HParams(config),
        *([LearningRateMonitor()] if has_logger else []),  # it refuses to run without a logger
    ]
