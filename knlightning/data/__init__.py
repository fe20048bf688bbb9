"""Data: one LightningDataModule for each family of datasets."""

from knlightning.data.base import BaseDataModule
from knlightning.data.cifar import CIFAR10DataModule, CIFAR100DataModule
from knlightning.data.cityscapes import CityscapesDataModule
from knlightning.data.digit_scenes import DigitScenesDataModule
from knlightning.data.digits import DigitsDataModule
from knlightning.data.folder import FolderImages
from knlightning.data.hugging_face import HuggingFaceDataModule, TableDataModule
from knlightning.data.hugging_face_masks import HuggingFaceSegmentationDataModule
from knlightning.data.image_files import ImageFiles, LabelledFiles
from knlightning.data.image_folder import ImageFolderDataModule
from knlightning.data.imagenet import ImageNetDataModule
from knlightning.data.imagenet32 import ImageNet32DataModule
from knlightning.data.in_memory import ImageDataModule
from knlightning.data.labelled_files import LabelledFilesDataModule
from knlightning.data.loader import ResumableLoader
from knlightning.data.loops import batches
from knlightning.data.masked_files import MaskedFiles, MaskedFilesDataModule
from knlightning.data.photographs import PhotographsDataModule
from knlightning.data.samplers import EvalSampler, Sampling, TrainSampler
from knlightning.data.segmentation import SegmentationDataModule
from knlightning.data.streaming import StreamingDataModule
from knlightning.data.transforms import random_crop, random_erasing, random_horizontal_flip

__all__ = [
    "BaseDataModule",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "CityscapesDataModule",
    "DigitScenesDataModule",
    "DigitsDataModule",
    "EvalSampler",
    "FolderImages",
    "HuggingFaceDataModule",
    "HuggingFaceSegmentationDataModule",
    "ImageDataModule",
    "ImageFiles",
    "ImageFolderDataModule",
    "ImageNet32DataModule",
    "ImageNetDataModule",
    "LabelledFiles",
    "LabelledFilesDataModule",
    "MaskedFiles",
    "MaskedFilesDataModule",
    "PhotographsDataModule",
    "ResumableLoader",
    "Sampling",
    "SegmentationDataModule",
    "StreamingDataModule",
    "TableDataModule",
    "TrainSampler",
    "batches",
    "random_crop",
    "random_erasing",
    "random_horizontal_flip",
]
