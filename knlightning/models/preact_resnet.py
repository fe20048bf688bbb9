"""Residual networks with normalization and activation before each convolution (He et al., ECCV 2016)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from knlightning.models.knresnet import Layers, check_num_classes
from knlightning.nn import Activation, Norm


class PreactBlock(nn.Module):
    """Convolutions around the identity or, where the shape changes, around a convolution of the first activation."""

    def __init__(self, in_channels: int, width: int, stride: int, bottleneck: bool, layers: Layers) -> None:
        super().__init__()
        channels = 4 * width if bottleneck else width
        self.act = layers.norm_act(in_channels)
        self.shortcut = layers.conv(in_channels, channels, 1, stride) if stride > 1 or in_channels != channels else None
        if bottleneck:
            self.residual = nn.Sequential(
                layers.conv(in_channels, width, 1),
                layers.norm_act(width),
                layers.conv(width, width, 3, stride, 1),
                layers.norm_act(width),
                layers.conv(width, channels, 1),
            )
        else:
            self.residual = nn.Sequential(
                layers.conv(in_channels, width, 3, stride, 1),
                layers.norm_act(width),
                layers.conv(width, width, 3, padding=1),
            )

    def forward(self, x: Tensor) -> Tensor:
        activated = self.act(x)
        return self.residual(activated) + (x if self.shortcut is None else self.shortcut(activated))


class PreactResNet(nn.Module):
    """Pre-activated residual network for classification, with a norm and an activation before the average pooling.

    Maps images [N, 3, H, W] to logits [N, num_classes]. The stem for large images is that of ResNet, with norm and
    activation. Source: He et al., Identity Mappings in Deep Residual Networks (ECCV 2016).

    Args:
        blocks: number of blocks in each of the four stages.
        bottleneck: whether the blocks are bottlenecks.
        num_classes: number of classes.
        low_resolution: a 3x3 stem without pooling, for images such as 32x32, in place of 7x7 with.
        layers: how the network normalizes.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self, blocks: Sequence[int], bottleneck: bool, num_classes: int, low_resolution: bool, layers: Layers
    ) -> None:
        super().__init__()
        check_num_classes(num_classes)
        channels = 64
        self.stem = (
            layers.conv(3, channels, 3, padding=1)
            if low_resolution
            else nn.Sequential(layers.conv(3, channels, 7, 2, 3), layers.norm_act(channels), nn.MaxPool2d(3, 2, 1))
        )
        self.stages = nn.Sequential()
        for i, count in enumerate(blocks):
            stage = nn.Sequential()
            for j in range(count):
                width = 64 * 2**i
                stage.append(PreactBlock(channels, width, 2 if i > 0 and j == 0 else 1, bottleneck, layers))
                channels = 4 * width if bottleneck else width
            self.stages.append(stage)
        self.head = layers.head(channels)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.stages(self.stem(x)))
        return self.fc(torch.flatten(self.pool(x), 1))


def preact_resnet18(
    num_classes: int = 1000,
    norm: Norm = "batch",
    low_resolution: bool = False,
    activation: Activation = "relu",
    dropout_p: float = 0.05,
) -> PreactResNet:
    """Make a PreactResNet-18 (He et al., ECCV 2016).

    Args:
        num_classes: number of classes.
        norm: name of the normalization, as for :func:`knlightning.nn.make_norm`, but "kernel" makes each convolution
            and the norm before it a KNConv, and the last norm a KernelNorm. The convolutions of "kernel" and "none"
            have a bias, as no other layer adds one.
        low_resolution: a 3x3 stem without pooling, for images such as 32x32, in place of 7x7 with.
        activation: name of the activation.
        dropout_p: dropout probability of KNConv in [0, 1), of no effect with other norms; that of the KernelNorm is
            five times as high, at most 0.25.

    Raises:
        ValueError: if an argument is out of its range.
    """
    layers = Layers(norm, dropout_p, activation, bias=norm == "none")
    return PreactResNet((2, 2, 2, 2), False, num_classes, low_resolution, layers)


def preact_resnet34(
    num_classes: int = 1000,
    norm: Norm = "batch",
    low_resolution: bool = False,
    activation: Activation = "relu",
    dropout_p: float = 0.05,
) -> PreactResNet:
    """Make a PreactResNet-34 (He et al., ECCV 2016); arguments as in :func:`preact_resnet18`."""
    layers = Layers(norm, dropout_p, activation, bias=norm == "none")
    return PreactResNet((3, 4, 6, 3), False, num_classes, low_resolution, layers)


def preact_resnet50(
    num_classes: int = 1000,
    norm: Norm = "batch",
    low_resolution: bool = False,
    activation: Activation = "relu",
    dropout_p: float = 0.05,
) -> PreactResNet:
    """Make a PreactResNet-50 (He et al., ECCV 2016; strides in the 3x3 convolutions).

    Arguments as in :func:`preact_resnet18`.
    """
    layers = Layers(norm, dropout_p, activation, bias=norm == "none")
    return PreactResNet((3, 4, 6, 3), True, num_classes, low_resolution, layers)
