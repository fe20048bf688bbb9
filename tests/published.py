"""Weights, inputs and outputs of the published implementation, computed once in float64 without dropout.

The weights of a tensor and the inputs are given by formulas, so that outputs alone need to be stored.
"""

import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VALUES: dict[str, Any] = json.loads((Path(__file__).parent / "reference_values.json").read_text())
KEYS: dict[str, list[tuple[str, list[int]]]] = json.loads((Path(__file__).parent / "norm_torch_keys.json").read_text())


def weights(name: str, shape: Sequence[int]) -> Tensor:
    """Fill the tensor with the published name `name`."""
    h = zlib.crc32(name.encode()) % 10007
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    values = torch.sin(0.7390851 * k + 0.01 * h) + 0.3 * torch.cos(0.1173 * k + h)
    return (values * (1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1)).reshape(*shape)


def images(shape: Sequence[int]) -> Tensor:
    """Fill an input of the given shape."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return (0.5 + 0.5 * torch.sin(0.0137 * k) * torch.cos(0.3331 * k + 1)).reshape(*shape)


def state(name: str) -> dict[str, Tensor]:
    """Make random weights of a network by their published names."""
    return {key: torch.randn(shape) for key, shape in KEYS[name]}
