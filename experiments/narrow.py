"""A ResNet-8 and a preactivated ResNet-8 with half the filters, so that batches of two take a CPU few milliseconds."""

from torch import nn

from knlightning.models.layers import Layers, Options
from knlightning.models.preact_resnet import PreactResNet
from knlightning.models.resnet import resnet8_layers
from knlightning.nn import Norm

WIDTH = 32
"""Filters of the first convolution; group normalization has as many groups."""


def resnet8(num_classes: int, norm: Norm, low_resolution: bool = False, eps: float = 1e-5) -> nn.Module:
    """Make a `knlightning.models.resnet8` with half the filters and 1x1 averages before the linear layer.

    Args:
        num_classes: Number of classes.
        norm: Name of the normalization.
        low_resolution: Whether the stem keeps the resolution.
        eps: Added to the variance.
    """
    layers = Layers(Options(norm=norm, low_resolution=low_resolution, eps=eps), bias=norm == "none")
    pool = layers.head_norm() if norm == "kernel" else nn.Identity()
    return nn.Sequential(
        *resnet8_layers(WIDTH, layers), pool, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * WIDTH, num_classes)
    )


def preact_resnet8(num_classes: int, norm: Norm, low_resolution: bool = False, eps: float = 1e-5) -> nn.Module:
    """Make a preactivated ResNet-8: one block in each of three stages.

    Args:
        num_classes: Number of classes.
        norm: Name of the normalization.
        low_resolution: Whether the stem keeps the resolution.
        eps: Added to the variance.
    """
    options = Options(num_classes=num_classes, norm=norm, low_resolution=low_resolution, eps=eps)
    return PreactResNet((1, 1, 1), options, width=WIDTH)
