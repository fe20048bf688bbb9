"""Data: one LightningDataModule for each family of datasets."""

from knlightning.data.base import ImageDataModule
from knlightning.data.cifar import CIFAR10DataModule, CIFAR100DataModule
from knlightning.data.cityscapes import CityscapesDataModule
from knlightning.data.digit_scenes import DigitScenesDataModule
from knlightning.data.digits import DigitsDataModule
from knlightning.data.folder import FolderImages
from knlightning.data.image_folder import ImageFolderDataModule
from knlightning.data.imagenet import ImageNetDataModule
from knlightning.data.imagenet32 import ImageNet32DataModule
from knlightning.data.loader import ResumableLoader
from knlightning.data.samplers import EvalSampler, TrainSampler
from knlightning.data.segmentation import SegmentationDataModule
from knlightning.data.transforms import random_crop, random_horizontal_flip

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "CityscapesDataModule",
    "DigitScenesDataModule",
    "DigitsDataModule",
    "EvalSampler",
    "FolderImages",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageNet32DataModule",
    "ImageNetDataModule",
    "ResumableLoader",
    "SegmentationDataModule",
    "TrainSampler",
    "random_crop",
    "random_horizontal_flip",
]
