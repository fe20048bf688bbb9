"""What Lightning says at every start, and no user needs to act on."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

QUIET_WARNINGS = (
    "The '.*_dataloader' does not have many workers",  # images in memory: workers only slow it down
    "The number of training batches .* is smaller than the logging interval",  # every epoch is logged anyway
    r"\s*``instantiate_classes`` was deprecated",  # LightningCLI's own use of jsonargparse
    r"\s*By default only one JsonargparseDeprecationWarning",  # what goes before it
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own use of torch
    r"`ModelCheckpoint\(monitor=.*\)` could not find the monitored key",  # BestCheckpoint says it at the start
    "You are using `LearningRateMonitor` callback with models that have no learning rate schedulers",  # is no error
)
LOGGERS = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed")
"""Filters of a logger see its own records alone."""
QUIET_INFOS = (
    "litlogger",  # an advertisement
    "PU available: ",  # the summary names the device
    "LOCAL_RANK: ",
    "Seed set to ",  # config.yaml has it
    "Restoring states from",  # the command names the checkpoint
    "Restored all states",
    "Loaded model weights",
    "`Trainer.fit` stopped: ",  # the last epoch says it
)


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what Lightning says at every start."""
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_is_news)
    with warnings.catch_warnings():
        for message in QUIET_WARNINGS:
            warnings.filterwarnings("ignore", message)
        yield


def _is_news(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in QUIET_INFOS)
