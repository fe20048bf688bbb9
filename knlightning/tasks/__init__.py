"""What a network is trained for: LightningModules around a backbone."""

from knlightning.tasks.base import Task
from knlightning.tasks.classification import ClassificationTask
from knlightning.tasks.schedules import CosineLR, PolyLR
from knlightning.tasks.segmentation import SegmentationTask

__all__ = ["ClassificationTask", "CosineLR", "PolyLR", "SegmentationTask", "Task"]
