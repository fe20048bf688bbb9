"""Kernel normalized residual networks for classification (Nasirigerdeh et al., TMLR 2024, Figures 3 and 5)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from knlightning.models.classifier import Classifier
from knlightning.models.layers import Layers, Options, Padding, Stage, convolve
from knlightning.models.norm_torch import (
    IMAGENET,
    KNResNet18_Weights,
    KNResNet34_Weights,
    KNResNet50_Weights,
    PublishedWeights,
)
from knlightning.models.registry import register, with_arguments_of
from knlightning.models.weights import load_weights

WEIGHTS = f"{IMAGENET}: ImageNet, by the authors of the paper"


@dataclass(frozen=True, kw_only=True)
class PublishedOptions(Options):
    """The options of a network of which weights are published.

    Args:
        weights: The published weights to begin with, which are downloaded if they are not there; None for random ones.
            With another number of classes the last layer stays random.
    """

    weights: Literal["imagenet1k_norm_torch"] | None = None


class BasicBlock(nn.Module):
    """Two convolutions, 2x2 or 3x3, around the identity (Figure 3)."""

    def __init__(self, channels: int, inner: int, layers: Layers, k: int = 2) -> None:
        super().__init__()
        self.act1 = layers.norm_act(channels)
        self.conv1 = layers.conv(channels, inner, k, padding=1)
        self.act2 = layers.norm_act(inner)
        self.conv2 = layers.conv(inner, channels, k, padding=k - 2)  # 2x2 takes away what the first has added

    def forward(self, x: Tensor) -> Tensor:
        out = convolve(self.conv1, x, before=self.act1, after=self.act2)
        return convolve(self.conv2, out, residual=x)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 2x2, or of 1x1, around the identity (Figure 3)."""

    def __init__(self, channels: int, inner: int, layers: Layers, pointwise: bool = False) -> None:
        super().__init__()
        outer = 1 if pointwise else 2
        self.act1 = layers.norm_act(channels)
        self.conv1 = layers.conv(channels, inner, outer, padding=outer - 1)
        self.act2 = layers.norm_act(inner)
        self.conv2 = layers.conv(inner, inner, 3, padding=1)
        self.act3 = layers.norm_act(inner)
        self.conv3 = layers.conv(inner, channels, outer)

    def forward(self, x: Tensor) -> Tensor:
        out = convolve(self.conv1, x, before=self.act1, after=self.act2)
        out = convolve(self.conv2, out, after=self.act3)
        return convolve(self.conv3, out, residual=x)


class Transition(nn.Sequential):
    """Change the number of channels, and by default halve the resolution (Figure 3)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        k: int,
        padding: Padding,
        layers: Layers,
        pool: nn.Module | None = None,
    ) -> None:
        conv = layers.conv(in_channels, out_channels, k, padding=padding)
        super().__init__(layers.norm_act(in_channels), conv, nn.MaxPool2d(2) if pool is None else pool)

    def forward(self, x: Tensor) -> Tensor:
        return self[2](convolve(self[1], x, before=self[0]))


class Stem(nn.Sequential):
    """A convolution of the image, pooled unless the image is small."""

    def __init__(self, channels: int, layers: Layers) -> None:
        if layers.options.low_resolution:
            super().__init__(layers.conv(3, channels, 3, padding=1), nn.Identity())
        else:
            super().__init__(layers.conv(3, channels, 7, stride=2, padding=3), nn.MaxPool2d(3, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self[1](convolve(self[0], x))


class KNTrunk(nn.Module):
    """Stem and stages of a kernel normalized residual network.

    Maps images [N, 3, H, W], floating point, to features [N, channels of the last stage, h, w]. Source: Nasirigerdeh
    et al. (TMLR 2024), Figures 3 and 5.

    Args:
        stages: The stages; the stem has the channels of the first.
        layers: Makes the layers.
        bottleneck: Whether the blocks are bottlenecks.
        overlapping: Whether the pooling between the stages takes maxima of 3x3 with padding in place of 2x2, for
            images of any size.
    """

    def __init__(
        self, stages: Sequence[Stage], layers: Layers, *, bottleneck: bool = False, overlapping: bool = False
    ) -> None:
        super().__init__()
        self.stem = Stem(stages[0].channels, layers)
        # 2x2 windows pad one side more than the other; the sides alternate. (left, right, top, bottom)
        last: Padding = (1, 0, 1, 0) if layers.options.low_resolution else (2, 1, 2, 1)
        pads: list[Padding] = [(1, 0, 1, 0), (0, 1, 0, 1), last]
        self.transitions = nn.ModuleList()
        self.stages = nn.ModuleList()
        for i, stage in enumerate(stages):
            if i > 0:
                k = 1 if stage.pointwise else stage.k
                padding = pads[i - 1] if k == 2 else k // 2
                pool = nn.MaxPool2d(3, 2, 1) if overlapping else nn.MaxPool2d(2)
                self.transitions.append(Transition(stages[i - 1].channels, stage.channels, k, padding, layers, pool))
            blocks: list[nn.Module] = [
                Bottleneck(stage.channels, stage.inner, layers, stage.pointwise)
                if bottleneck
                else BasicBlock(stage.channels, stage.inner, layers, stage.k)
                for _ in range(stage.blocks)
            ]
            self.stages.append(nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the features of images.

        Args:
            x: Images [N, 3, H, W], floating point.

        Returns:
            Features [N, channels of the last stage, h, w].
        """
        x = self.stages[0](self.stem(x))
        for transition, stage in zip(self.transitions, self.stages[1:], strict=True):
            x = stage(transition(x))
        return x


class KNResNet(Classifier, KNTrunk):
    """Kernel normalized residual network for classification.

    Maps images [N, 3, H, W], floating point, to logits [N, num_classes]. Source: Nasirigerdeh et al. (TMLR 2024),
    Figure 5.

    Args:
        stages: The stages; the stem has the channels of the first.
        layers: Makes the layers.
        bottleneck: Whether the blocks are bottlenecks.
        tail_channels: Filters of a last convolution after one more pooling, or None for no such layers.
        pooled: Height and width to which the features are averaged before the linear layer.

    Attributes:
        weights_enum: What is published for a network of this size; None for nothing.
    """

    weights_enum: type[PublishedWeights] | None = None

    def __init__(
        self,
        stages: Sequence[Stage],
        layers: Layers,
        *,
        bottleneck: bool = False,
        tail_channels: int | None = None,
        pooled: int = 1,
    ) -> None:
        KNTrunk.__init__(self, stages, layers, bottleneck=bottleneck)
        channels = stages[-1].channels
        self.tail: nn.Module = nn.Identity()
        if tail_channels is not None:
            conv = layers.conv(channels, tail_channels, 2, padding=1 if layers.options.low_resolution else 0)
            self.tail = nn.Sequential(nn.MaxPool2d(2), layers.norm_act(channels), conv)
            channels = tail_channels
        self.head = layers.head(channels)
        self.pool = nn.AdaptiveAvgPool2d(pooled)
        self.num_features = channels
        self.fc = nn.Linear(channels * pooled**2, layers.options.num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images to the activated features before the average pooling."""
        return self.head(self.tail(KNTrunk.forward(self, x)))

    def pooled(self, features: Tensor) -> Tensor:
        """Average the features."""
        return torch.flatten(self.pool(features), 1)


@register()
@with_arguments_of(Options, num_classes=10, low_resolution=True)
def knresnet8(options: Options) -> KNResNet:
    """Make a small member of the family, with one basic block a stage, that a laptop trains in a minute.

    Not in the paper.
    """
    return KNResNet((Stage(16, 1, 32), Stage(32, 1, 64), Stage(64, 1, 128)), Layers(options))


@register()
@with_arguments_of(Options, num_classes=10, low_resolution=True)
def knresnet13(options: Options) -> KNResNet:
    """Make a KNResNet-13, a network for private training on small images.

    A basic block at each of 64, 64, 128 and 256 channels, all of 3x3 convolutions, and 2x2 averages before the linear
    layer. Source: Nasirigerdeh et al., Kernel Normalized Convolutional Networks for Privacy-Preserving Machine Learning
    (2023), whose code has dropout probabilities of 0.1, and 0.5 before the classifier.
    """
    stages = (Stage(64, 1, 64, k=3), Stage(64, 1, 64, k=3), Stage(128, 1, 128, k=3), Stage(256, 1, 256, k=3))
    return KNResNet(stages, Layers(options), pooled=2)


@register(weights=WEIGHTS, tables=("1", "2", "4", "cifar10"))
@with_arguments_of(PublishedOptions)
def knresnet18(options: PublishedOptions) -> KNResNet:
    """Make a KNResNet-18 (Nasirigerdeh et al., TMLR 2024, Figure 5b)."""
    stages = (Stage(64, 2, 256), Stage(256, 2, 256), Stage(512, 1, 512), Stage(724, 1, 724))
    return _with_weights(KNResNet(stages, Layers(options), tail_channels=512), KNResNet18_Weights, options)


@register(weights=WEIGHTS, tables=("1", "2"))
@with_arguments_of(PublishedOptions)
def knresnet34(options: PublishedOptions) -> KNResNet:
    """Make a KNResNet-34 (Nasirigerdeh et al., TMLR 2024, Figure 5c)."""
    stages = (Stage(64, 4, 256), Stage(256, 5, 320), Stage(512, 3, 640), Stage(512, 2, 843))
    return _with_weights(KNResNet(stages, Layers(options), tail_channels=512), KNResNet34_Weights, options)


@register(weights=WEIGHTS, tables=("1", "2", "ablation"))
@with_arguments_of(PublishedOptions)
def knresnet50(options: PublishedOptions) -> KNResNet:
    """Make a KNResNet-50 (Nasirigerdeh et al., TMLR 2024, Figure 5d)."""
    stages = (Stage(256, 4, 64), Stage(512, 5, 128), Stage(810, 4, 201), Stage(2048, 2, 512, pointwise=True))
    return _with_weights(KNResNet(stages, Layers(options), bottleneck=True), KNResNet50_Weights, options)


@register()
@with_arguments_of(Options)
def knresnet101(options: Options) -> KNResNet:
    """Make a KNResNet-101, by the rule of KNResNet-50.

    Its transitions stand for one bottleneck. The third stage is the deepest; its channels, four times those within a
    bottleneck, are as many as the parameters of ResNet-101 allow. Not in the paper.
    """
    stages = (Stage(256, 4, 64), Stage(512, 5, 128), Stage(696, 21, 174), Stage(2048, 2, 512, pointwise=True))
    return KNResNet(stages, Layers(options), bottleneck=True)


@register()
@with_arguments_of(Options)
def knresnet152(options: Options) -> KNResNet:
    """Make a KNResNet-152, as `knresnet101` follows from ResNet-101. Not in the paper."""
    stages = (Stage(256, 4, 64), Stage(512, 9, 128), Stage(668, 34, 167), Stage(2048, 2, 512, pointwise=True))
    return KNResNet(stages, Layers(options), bottleneck=True)


def _with_weights(network: KNResNet, published: type[PublishedWeights], options: PublishedOptions) -> KNResNet:
    network.weights_enum = published
    if options.weights is not None:
        load_weights(network, options.weights)
    return network
