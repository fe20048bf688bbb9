"""What the package uses of Lightning that is not public."""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, WeightAveraging
from lightning.pytorch.loops.progress import _ProcessedTracker
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim.swa_utils import AveragedModel


def is_fitting(trainer: Trainer) -> bool:
    """Say whether `Trainer.fit` runs, be it in training or in its validation. Tried with lightning 2.6.6."""
    return trainer.state.fn == TrainerFn.FITTING


def num_batches_started(trainer: Trainer) -> int:
    """Count the training batches of the epoch that were started, also before a resume. Tried with lightning 2.6.6."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready


def is_restoring(trainer: Trainer) -> bool:
    """Say whether what a checkpoint holds is just being restored. Tried with lightning 2.6.6."""
    return bool(trainer._checkpoint_connector._loaded_checkpoint)


def averaged_model(callback: WeightAveraging) -> AveragedModel | None:
    """Return the average that a callback keeps; None if it has none yet. Tried with lightning 2.6.6."""
    return callback._average_model


def forget_average(callback: WeightAveraging) -> None:
    """Take the average from a callback, which then leaves the weights alone. Tried with lightning 2.6.6."""
    callback._average_model = None


# ---- private training


@contextmanager
def overridden(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of a trainer, a task or a callback, and set it back at the end. Tried with lightning 2.6.6.

    What Lightning does with an attribute that changes after it was made is not documented. The test of each use is
    in the tests of the function that uses it.
    """
    method = isinstance(owner, nn.Module) or inspect.isfunction(getattr(type(owner), name, None))
    inherited = method and name not in vars(owner)
    before = getattr(owner, name, None)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def replaced_train_loader(trainer: Trainer, replace: Callable[[Any], Any]) -> Iterator[Any]:
    """Train on another loader; to be entered in `Callback.setup`. Tried with lightning 2.6.6.

    Args:
        trainer: In `fit`, with a training loader of any source: a datamodule, the task, or an argument of `fit`.
        replace: Makes the other loader from the given one.

    Yields:
        The other loader. Lightning adds no sampler to it unless it is a `torch.utils.data.DataLoader`.
    """
    source = trainer.fit_loop._data_source
    loader = replace(source.dataloader())
    trainer.fit_loop._data_source = _DataLoaderSource(loader, "train_dataloader")
    try:
        yield loader
    finally:
        trainer.fit_loop._data_source = source


@contextmanager
def counting_steps(trainer: Trainer, micro_batches: int) -> Iterator[None]:
    """Take one step for several batches of the loader, and let users count steps. Tried with lightning 2.6.6.

    The trainer's `limit_train_batches` and `val_check_interval`, where they are numbers of batches, and the progress
    bar count steps then. To be entered in `Callback.setup`, before the trainer looks at the loader.

    Args:
        trainer: In `fit`.
        micro_batches: Number of batches in a step, at least 1.
    """
    with ExitStack() as undo:
        undo.enter_context(overridden(trainer, "accumulate_grad_batches", micro_batches))
        for name in ("limit_train_batches", "val_check_interval"):
            if isinstance(count := getattr(trainer, name), int) and not isinstance(count, bool):
                undo.enter_context(overridden(trainer, name, count * micro_batches))
        bar = trainer.progress_bar_callback
        if bar is not None and micro_batches > 1:
            undo.enter_context(overridden(bar, "__class__", _counting_steps(type(bar), micro_batches)))
        yield


def _counting_steps(bar: type[ProgressBar], micro_batches: int) -> type[ProgressBar]:
    """Derive a class of progress bars that counts steps; `Trainer` takes no other bar once it is made."""
    base: Any = bar

    class StepProgressBar(base):
        @property
        def total_train_batches(self) -> int | float:
            return super().total_train_batches // micro_batches

        def on_train_batch_start(self, trainer: Trainer, task: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(trainer, task, batch, batch_idx // micro_batches)

        def on_train_batch_end(self, trainer: Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if (batch_idx + 1) % micro_batches == 0:
                super().on_train_batch_end(trainer, task, outputs, batch, batch_idx // micro_batches)

    return StepProgressBar


def prepared_batch(trainer: Trainer, task: LightningModule, batch: Any) -> Any:
    """Bring a batch to where training has it: precision, hooks, and device. Tried with lightning 2.6.6."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = task._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


# ---- runs that stop and go on


def is_resuming(module: LightningModule) -> bool:
    """Say whether it is `Trainer.fit` that loads a checkpoint into a module. Tried with lightning 2.6.6.

    Otherwise it is `load_from_checkpoint`, or `Trainer.validate`, `test` or `predict`.
    """
    return module._trainer is not None and is_fitting(module._trainer)


def is_accumulating(trainer: Trainer) -> bool:
    """Say whether the latest training batch has left a step of the optimizer unfinished. Tried with lightning 2.6.6."""
    return trainer.fit_loop._should_accumulate()


def num_epochs_trained(trainer: Trainer) -> int:
    """Count the epochs of which all batches were trained on; to be called when training starts.

    Tried with lightning 2.6.6.
    """
    return _epochs(trainer).processed + is_epoch_over(trainer)


def is_epoch_over(trainer: Trainer) -> bool:
    """Say whether a run resumes behind the last batch of an epoch, before its end; to be called when training starts.

    So it is with a checkpoint that was written within the validation. Tried with lightning 2.6.6.
    """
    return _batches_begun(trainer) >= trainer.num_training_batches


def num_steps_left(trainer: Trainer) -> float:
    """Count the steps of the optimizer up to the end of the run; to be called when training starts.

    Epochs to come have as many steps as the training loader of now has, whatever those before had. Infinite if neither
    the trainer's max_epochs nor its max_steps bounds the run. Tried with lightning 2.6.6.
    """
    left, max_epochs = math.inf, trainer.max_epochs
    if max_epochs is not None and max_epochs != -1:
        accumulated = trainer.accumulate_grad_batches
        per_epoch = math.ceil(trainer.num_training_batches / accumulated)
        begun = 0 if is_epoch_over(trainer) else _batches_begun(trainer)
        left = (max_epochs - num_epochs_trained(trainer)) * per_epoch - begun // accumulated
    if trainer.max_steps != -1:
        left = min(left, trainer.max_steps - trainer.global_step)
    return max(left, 0)


def _batches_begun(trainer: Trainer) -> int:
    """Count the batches of the epoch in which a run resumes; 0 if it resumes between epochs."""
    epochs = _epochs(trainer)
    return num_batches_started(trainer) if epochs.started > epochs.processed else 0


def _epochs(trainer: Trainer) -> _ProcessedTracker:
    counts = trainer.fit_loop.epoch_progress.current
    assert isinstance(counts, _ProcessedTracker)
    return counts


def rewind_unfinished_epoch(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Let a checkpoint say that its epoch is not over if the run was stopped within it.

    At the end of a run that max_steps, max_time or early stopping ends, Lightning counts the epoch as a whole one, and
    the rest of it would be left out when the run goes on. The counters become those of a checkpoint that was written
    after the last batch. Tried with lightning 2.6.6.
    """
    epochs, epoch_loop = _epochs(trainer), trainer.fit_loop.epoch_loop
    counted = 0 < epochs.started == epochs.processed
    if not counted or not epoch_loop.done or epoch_loop._num_ready_batches_reached():
        return
    loops = checkpoint["loops"]["fit_loop"]
    for count in loops["epoch_progress"].values():
        count["processed"] = count["completed"] = count["started"] - 1
    for kind in ("total", "current"):
        loops["epoch_loop.batch_progress"][kind]["completed"] -= 1
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
    checkpoint["epoch"] = epochs.started - 1


def unbiased_losses(losses: list[float]) -> list[float]:
    """Correct the losses of Lightning's range test of learning rates, in which the first is half of what it was.

    They are running means, 0.98 of the one before, and the number of steps by which their bias is corrected is one too
    high. Tried with lightning 2.6.6.
    """
    return [loss * (1 - 0.98 ** (step + 1)) / (1 - 0.98**step) for step, loss in enumerate(losses, 1)]
