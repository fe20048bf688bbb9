"""What the package uses of Lightning that is not public."""

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim.swa_utils import AveragedModel


def is_fitting(trainer: Trainer) -> bool:
    """Say whether `Trainer.fit` runs, be it in training or in its validation. Tried with lightning 2.6.6."""
    return trainer.state.fn == TrainerFn.FITTING


def num_batches_started(trainer: Trainer) -> int:
    """Count the training batches of the epoch that were started, also before a resume. Tried with lightning 2.6.6."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready


def averaged_model(callback: WeightAveraging) -> AveragedModel | None:
    """Return the average that a callback keeps; None if it has none yet. Tried with lightning 2.6.6."""
    return callback._average_model


def forget_average(callback: WeightAveraging) -> None:
    """Take the average from a callback, which then leaves the weights alone. Tried with lightning 2.6.6."""
    callback._average_model = None
