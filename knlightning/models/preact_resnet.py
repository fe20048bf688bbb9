"""Residual networks with normalization and activation before each convolution (He et al., ECCV 2016)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from knlightning.models.classifier import Classifier
from knlightning.models.layers import Layers, Options
from knlightning.models.registry import register, with_arguments_of


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


class PreactResNet(Classifier):
    """Pre-activated residual network for classification, with a norm and an activation before the average pooling.

    Maps images [N, 3, H, W] to logits [N, num_classes]. The stem for large images is that of ResNet, with norm and
    activation. A kernel normalized network has a KernelNorm as its last norm; the convolutions of "kernel" and "none"
    have a bias, as no other layer adds one. Source: He et al., Identity Mappings in Deep Residual Networks (ECCV 2016).

    Args:
        blocks: Number of blocks in each stage.
        options: Options of the network.
        bottleneck: Whether the blocks are bottlenecks.
        width: Filters of the stem and of the first stage, which double from stage to stage.
    """

    def __init__(self, blocks: Sequence[int], options: Options, *, bottleneck: bool = False, width: int = 64) -> None:
        super().__init__()
        layers = Layers(options, bias=options.norm == "none")
        channels = width
        self.stem = (
            layers.conv(3, channels, 3, padding=1)
            if options.low_resolution
            else nn.Sequential(layers.conv(3, channels, 7, 2, 3), layers.norm_act(channels), nn.MaxPool2d(3, 2, 1))
        )
        self.stages = nn.Sequential()
        for i, count in enumerate(blocks):
            stage = nn.Sequential()
            for j in range(count):
                inner = width * 2**i
                stage.append(PreactBlock(channels, inner, 2 if i > 0 and j == 0 else 1, bottleneck, layers))
                channels = 4 * inner if bottleneck else inner
            self.stages.append(stage)
        self.head = layers.head(channels)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.num_features = channels
        self.fc = nn.Linear(channels, options.num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images to the activated features before the average pooling."""
        return self.head(self.stages(self.stem(x)))

    def pooled(self, features: Tensor) -> Tensor:
        """Average the features."""
        return torch.flatten(self.pool(features), 1)


@register(tables=("1",))
@with_arguments_of(Options, norm="batch")
def preact_resnet18(options: Options) -> PreactResNet:
    """Make a PreactResNet-18 (He et al., ECCV 2016)."""
    return PreactResNet((2, 2, 2, 2), options)


@register(tables=("1",))
@with_arguments_of(Options, norm="batch")
def preact_resnet34(options: Options) -> PreactResNet:
    """Make a PreactResNet-34 (He et al., ECCV 2016)."""
    return PreactResNet((3, 4, 6, 3), options)


@register(tables=("1",))
@with_arguments_of(Options, norm="batch")
def preact_resnet50(options: Options) -> PreactResNet:
    """Make a PreactResNet-50 (He et al., ECCV 2016), with strides in the 3x3 convolutions."""
    return PreactResNet((3, 4, 6, 3), options, bottleneck=True)
