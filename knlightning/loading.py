"""Trained networks for use in Python: `knlightning.load`."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

from knlightning.checkpoint_files import check_checkpoint, plain_config, read_checkpoint
from knlightning.checks import check_number
from knlightning.data import BaseDataModule
from knlightning.data.decoding import decoded, fitted
from knlightning.data.folder import find_images
from knlightning.export import preprocessing_of
from knlightning.protocols import describe
from knlightning.run_directory import NAMED_CHECKPOINTS, checkpoint_in
from knlightning.tasks import SegmentationTask
from knlightning.tasks.stored import make_datamodule, task_class

Images = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
"""A file or a folder of them, an image of Pillow, an array (H, W, 3) or a tensor (3, H, W), both uint8."""


@dataclass(frozen=True)
class Prediction:
    """What a network says of an image.

    Attributes:
        label: The most probable class; "" if there is one for each pixel.
        probability: Its probability.
        probabilities: The most probable classes with their probabilities, the most probable first.
        label_map: Classes (H, W) of the pixels, int64; None if there is one for the image.
    """

    label: str = ""
    probability: float = 0.0
    probabilities: dict[str, float] | None = None
    label_map: Tensor | None = None


class TrainedModel:
    """A trained network with all that it takes to use it.

    Args:
        task: The task with its weights.
        datamodule: The data that it was trained on, which need not be there.

    Attributes:
        task: The task, in evaluation mode.
        network: Its network, from prepared images (N, C, H, W) to logits.
        classes: Names of the classes in the order of the logits; empty if they are not known.
        preprocessing: What the network expects of an image, as `knlightning.export.preprocessing_of` describes it.
    """

    def __init__(self, task: LightningModule, datamodule: LightningDataModule) -> None:
        self.task = task.eval()
        self.datamodule = datamodule
        network: Any = getattr(task, "backbone", task)
        self.network: nn.Module = network
        self._of_pixels = isinstance(task, SegmentationTask)
        self.preprocessing = preprocessing_of(datamodule, self._of_pixels)
        self.classes: list[str] = self.preprocessing.get("classes", [])

    def prepare(self, image: Images) -> Tensor:
        """Bring an image into the form that the network takes, as for evaluation and prediction.

        Args:
            image: A file, not a folder, or an image.

        Returns:
            float32 (3, H, W); for a class of each pixel of the image's own size.

        Raises:
            ValueError: If it cannot be read, or the datamodule of the run does not say how images are prepared.
        """
        if not isinstance(self.datamodule, BaseDataModule):
            raise ValueError(
                f"{type(self.datamodule).__name__} is no knlightning.data.BaseDataModule, which prepares images: apply"
                " `network` to images that are prepared"
            )
        opened = _opened(image)
        if self._of_pixels:
            pixels = tv.pil_to_tensor(opened)
        else:
            height, width = self.preprocessing["image_size"]
            pixels = fitted(opened, (height, width), self.preprocessing["resize"])
        return self.datamodule.prepared(pixels[None].to(self.task.device), train=False)[0]

    @torch.inference_mode()
    def predict(self, images: Images | Sequence[Images], top_k: int = 5, batch_size: int = 32) -> list[Prediction]:
        """Predict the class of images, or of their pixels.

        Args:
            images: An image, a file, a folder with all images in it and its subfolders, or a list of those.
            top_k: Number of classes whose probabilities are told, at least 1.
            batch_size: Number of images that are predicted at once, at least 1; images of which each pixel has a class
                are predicted one by one.

        Returns:
            A prediction of each image in their order; those of a folder are sorted by their paths.

        Raises:
            ValueError: If an image cannot be read.
        """
        check_number("top_k", top_k, at_least=1, integer=True)
        check_number("batch_size", batch_size, at_least=1, integer=True)
        every = list(_single(images))
        size = 1 if self._of_pixels else batch_size
        found: list[Prediction] = []
        for start in range(0, len(every), size):
            batch = torch.stack([self.prepare(image) for image in every[start : start + size]])
            if isinstance(task := self.task, SegmentationTask):
                (label_maps,) = task.in_parts(lambda part: (task.averaged_logits(part).argmax(dim=1),), batch)
                found += [Prediction(label_map=label_map) for label_map in label_maps.cpu()]
                continue
            logits: Tensor = getattr(task, "averaged_logits", task)(batch)
            probabilities = logits.float().softmax(dim=1)
            classes = describe(self.datamodule).names(probabilities.shape[1])
            top = probabilities.topk(min(top_k, len(classes)))
            for values, indices in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                named = {classes[index]: value for index, value in zip(indices, values, strict=True)}
                found.append(Prediction(classes[indices[0]], values[0], named))
        return found


def checkpoint_of(run_or_checkpoint: str | os.PathLike[str]) -> Path:
    """Return the file of a checkpoint.

    Args:
        run_or_checkpoint: As in `load`.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(run_or_checkpoint)
    if path.is_file():
        return path
    for which in reversed(NAMED_CHECKPOINTS):
        if checkpoint_in(path, which).is_file():
            return checkpoint_in(path, which)
    raise FileNotFoundError(f"there is no checkpoint {path}, and none in it: name a run, such as runs/quickstart/0")


def load(
    run_or_checkpoint: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    data: Mapping[str, Any] | None = None,
) -> TrainedModel:
    """Load the network of a run, with its preprocessing and the names of its classes.

        model = knlightning.load("runs/quickstart/0")
        for prediction in model.predict("photos"):
            print(prediction.label, prediction.probability)

    No code in the file is run. The configuration that is stored in it names classes and functions to import: load what
    you trust.

    Args:
        run_or_checkpoint: Directory of a run, of which the best checkpoint is taken, or the last if there is no best
            one; or the file of a checkpoint.
        device: Where the network goes.
        data: Arguments of the datamodule that are not those of the run, such as where its files lie now.

    Raises:
        FileNotFoundError: If there is no such run or file.
        ValueError: If the file is damaged, is no checkpoint of `knl fit`, or does not fit the installed packages.
    """
    path = checkpoint_of(run_or_checkpoint)
    stored = read_checkpoint(path)
    check_checkpoint(path, stored, to_resume=False)
    config = plain_config(path, stored)
    if not config:
        raise ValueError(f"{path} holds no configuration: it was not written by knl fit")
    task = task_class(config).load_from_checkpoint(path, map_location=device)
    if data:
        config["data"]["init_args"] = (config["data"].get("init_args") or {}) | dict(data)
    datamodule = make_datamodule(config)
    if names := stored.get(type(datamodule).__qualname__):
        datamodule.load_state_dict(names)
    return TrainedModel(task.to(device), datamodule)


def _single(images: Images | Sequence[Images]) -> Iterator[Images]:
    if isinstance(images, str | os.PathLike):
        yield from find_images(images) if os.path.isdir(images) else [images]
    elif isinstance(images, Image.Image) or (isinstance(images, np.ndarray | Tensor) and images.ndim == 3):
        yield images
    else:
        for image in images:
            yield from _single(image)


def _opened(image: Images) -> Image.Image:
    if isinstance(image, str | os.PathLike):
        return decoded(image)
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if image.dtype not in (np.uint8, torch.uint8):
        raise ValueError(f"an image must be uint8, an array (H, W, 3) or a tensor (3, H, W), got {image.dtype}")
    opened: Image.Image = tv.to_pil_image(image)
    return opened.convert("RGB")
