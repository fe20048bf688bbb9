"""A narrow ResNet-8 and preactivated ResNet-8, with about as many parameters as KNResNet-8: small enough for a CPU."""

from torch import nn

from knlightning.models.layers import Layers, Options
from knlightning.models.preact_resnet import PreactResNet
from knlightning.models.resnet import resnet8_layers
from knlightning.nn import Norm

WIDTH = 16
"""Filters of the first convolution, a quarter of those of `knlightning.models.resnet8`."""
GROUPS = 8
"""Groups of group normalization: two channels each at first, as 32 groups have in a network of full width."""


def resnet8(num_classes: int, norm: Norm, low_resolution: bool = True, eps: float = 1e-5) -> nn.Module:
    """Make a `knlightning.models.resnet8` with a quarter of the filters and 1x1 averages before the linear layer.

    Args:
        num_classes: Number of classes.
        norm: Name of the normalization.
        low_resolution: Whether the stem keeps the resolution.
        eps: Added to the variance.
    """
    layers = Layers(_options(num_classes, norm, low_resolution, eps), bias=norm == "none")
    pool = layers.head_norm() if norm == "kernel" else nn.Identity()
    features = resnet8_layers(WIDTH, layers)
    network = nn.Sequential(*features, pool, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * WIDTH, num_classes))
    return _grouped(network, norm)


def preact_resnet8(num_classes: int, norm: Norm, low_resolution: bool = True, eps: float = 1e-5) -> nn.Module:
    """Make a preactivated ResNet-8: one block in each of three stages.

    Args:
        num_classes: Number of classes.
        norm: Name of the normalization.
        low_resolution: Whether the stem keeps the resolution.
        eps: Added to the variance.
    """
    return _grouped(PreactResNet((1, 1, 1), _options(num_classes, norm, low_resolution, eps), width=WIDTH), norm)


def _options(num_classes: int, norm: Norm, low_resolution: bool, eps: float) -> Options:
    made: Norm = "layer" if norm == "group" else norm  # a layer normalization is one of a single group
    return Options(num_classes=num_classes, norm=made, low_resolution=low_resolution, eps=eps)


def _grouped(network: nn.Module, norm: Norm) -> nn.Module:
    for layer in network.modules():
        if norm == "group" and isinstance(layer, nn.GroupNorm):
            layer.num_groups = GROUPS
    return network
