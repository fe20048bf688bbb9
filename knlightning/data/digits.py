"""scikit-learn's handwritten digits: real images that need no download."""

import torch
import torch.nn.functional as F
from torch import Tensor

from knlightning.data.in_memory import ImageDataModule
from knlightning.data.transforms import random_crop
from knlightning.protocols import batch_independent

MAX_INK = 16
"""Largest value of a pixel."""


def read_ink(train: bool) -> tuple[Tensor, Tensor]:
    """Return the digits as they are stored, in their fixed split.

    Args:
        train: Whether to return the 1437 to train on, or the 360 to test on.

    Returns:
        Ink, uint8 `(N, 1, 8, 8)`, 0 to `MAX_INK`, and labels, int64 `(N,)`.
    """
    # here: slow to import
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    part = train_test_split(range(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target)[not train]
    return torch.from_numpy(digits.images[part]).to(torch.uint8).unsqueeze(1), torch.from_numpy(digits.target[part])


class DigitsDataModule(ImageDataModule):
    """1797 digits, light strokes on a dark background, 10 classes; 1437 to train on and 360 to test on.

    The 8x8 grey images of `sklearn.datasets.load_digits` are brought to 32x32 pixels (bilinear) and three equal
    channels, so that networks for small colour images run unchanged. The split is stratified by class and always the
    same. It does not separate writers, about whom the set says nothing: accuracy on new writers will be lower.

    While training, digits are shifted by up to two pixels. They are not mirrored: a mirrored digit is another sign.

    Arguments are those of `ImageDataModule`.
    """

    class_names = tuple("0123456789")
    # of the training images after scaling up
    mean = (0.3054, 0.3054, 0.3054)
    std = (0.3237, 0.3237, 0.3237)
    image_size = (32, 32)

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        """Return uint8 images `(1437 or 360, 3, 32, 32)` and their labels."""
        ink, labels = read_ink(train)
        large = F.interpolate(ink.float(), size=self.image_size, mode="bilinear")
        pixels = (large * (255 / MAX_INK)).round().to(torch.uint8)
        return pixels.repeat(1, 3, 1, 1), labels

    @batch_independent()
    def augmentation(self, images: Tensor) -> Tensor:
        """Shift each image by up to two pixels."""
        return random_crop(images, padding=2)
