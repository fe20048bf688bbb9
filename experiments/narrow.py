"""A narrow ResNet-8 and preactivated ResNet-8, with about as many parameters as KNResNet-8: small enough for a CPU."""

from dataclasses import replace

from torch import nn

from knlightning.models.layers import Layers, Options
from knlightning.models.preact_resnet import PreactResNet
from knlightning.models.registry import with_arguments_of
from knlightning.models.resnet import resnet8_layers

WIDTH = 16
"""Filters of the first convolution, a quarter of those of `knlightning.models.resnet8`."""
GROUPS = 8
"""Groups of group normalization: two channels each at first, as 32 groups have in a network of full width."""


@with_arguments_of(Options, num_classes=10, low_resolution=True)
def resnet8(options: Options) -> nn.Module:
    """Make a `knlightning.models.resnet8` with a quarter of the filters and 1x1 averages before the linear layer."""
    layers = Layers(_without_groups(options), bias=options.norm == "none")
    pool = layers.head_norm() if options.norm == "kernel" else nn.Identity()
    head = (pool, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * WIDTH, options.num_classes))
    return _grouped(nn.Sequential(*resnet8_layers(WIDTH, layers), *head), options)


@with_arguments_of(Options, num_classes=10, low_resolution=True)
def preact_resnet8(options: Options) -> nn.Module:
    """Make a preactivated ResNet-8: one block in each of three stages."""
    return _grouped(PreactResNet((1, 1, 1), _without_groups(options), width=WIDTH), options)


def _without_groups(options: Options) -> Options:
    """A layer normalization is one of a single group."""
    return replace(options, norm="layer") if options.norm == "group" else options


def _grouped(network: nn.Module, options: Options) -> nn.Module:
    for layer in network.modules():
        if options.norm == "group" and isinstance(layer, nn.GroupNorm):
            layer.num_groups = GROUPS
    return network
