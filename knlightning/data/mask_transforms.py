"""Augmentation of an image and its mask alike."""

from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from knlightning.data.segmentation import IGNORED


class RandomScale(v2.Transform):
    """Scale an image, and its mask alike, by a factor drawn at random.

    Images are interpolated bilinearly, without a filter against aliasing; masks take the nearest pixel.

    Args:
        low: Least factor, above 0.
        high: Largest factor, `low` or more.
        step: Distance between the factors, which are `low`, `low + step`, ... up to `high`, with equal probabilities;
            None for any factor in the range.
    """

    def __init__(self, low: float, high: float, step: float | None) -> None:
        super().__init__()
        self.low, self.high, self.step = low, high, step

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the size to scale to."""
        if self.step is None:
            factor = self.low + (self.high - self.low) * float(torch.rand(()))
        else:
            num_steps = int((self.high - self.low) / self.step + 1e-6)  # 1.6 / 0.1 may come out below 16
            factor = self.low + self.step * int(torch.randint(num_steps + 1, ()))
        height, width = tv.get_size(flat_inputs[0])
        return {"size": [max(1, round(height * factor)), max(1, round(width * factor))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Scale an image or a mask."""
        return tv.resize(inpt, params["size"], v2.InterpolationMode.BILINEAR, antialias=False)


class PadRightBottom(v2.Transform):
    """Pad an image, and its mask alike, on the right and at the bottom where it is too small.

    The image is padded with 0, black, and the mask with 255, which does not count.

    Args:
        size: Least `(height, width)` afterwards.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Pad an image or a mask."""
        height, width = tv.get_size(inpt)
        right, bottom = max(0, self.size[1] - width), max(0, self.size[0] - height)
        return tv.pad(inpt, [0, 0, right, bottom], fill=IGNORED if isinstance(inpt, tv_tensors.Mask) else 0)
