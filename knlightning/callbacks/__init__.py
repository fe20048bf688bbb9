"""What happens beside the training: seeds, checkpoints, averaged weights, logs, pictures, predictions."""

from knlightning.callbacks.always_on import CONFIGURED, made_for_every_run
from knlightning.callbacks.checkpoints import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint
from knlightning.callbacks.ema import EMA
from knlightning.callbacks.evaluation import EvaluationFiles
from knlightning.callbacks.finders import BatchSizeFinder, LearningRateFinder
from knlightning.callbacks.hparams import HParams, TensorBoardLog
from knlightning.callbacks.metrics_csv import MetricsCSV
from knlightning.callbacks.monitors import EarlyStopping
from knlightning.callbacks.pictures import Pictures
from knlightning.callbacks.predictions import PredictionWriter
from knlightning.callbacks.run_config import RunConfig
from knlightning.callbacks.schedule_free import ScheduleFree
from knlightning.callbacks.seeding import Seeding
from knlightning.callbacks.throughput import Throughput

__all__ = [
    "CONFIGURED",
    "EMA",
    "AtomicCheckpointIO",
    "BatchSizeFinder",
    "BestCheckpoint",
    "EarlyStopping",
    "EvaluationFiles",
    "HParams",
    "LastCheckpoint",
    "LearningRateFinder",
    "MetricsCSV",
    "Pictures",
    "PredictionWriter",
    "RunConfig",
    "ScheduleFree",
    "Seeding",
    "TensorBoardLog",
    "Throughput",
    "made_for_every_run",
]
