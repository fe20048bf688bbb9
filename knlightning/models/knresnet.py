"""Kernel normalized residual networks for classification (Nasirigerdeh et al., TMLR 2024, Figures 3 and 5)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from knlightning.nn import Activation, KernelNorm2d, KNConv2d, Norm, make_activation, make_norm
from knlightning.nn.functional import EvalStatistics

Padding = int | tuple[int, int, int, int]


@dataclass(frozen=True)
class Stage:
    """A row of residual blocks at one resolution.

    Args:
        channels: channels of the residual stream.
        blocks: number of residual blocks.
        inner: channels between the convolutions of a block.
        pointwise: the outer convolutions of the bottlenecks, and the transition before the stage, are 1x1.
        k: kernel size of the basic blocks and of the transition before the stage, 2 or 3.
    """

    channels: int
    blocks: int
    inner: int
    pointwise: bool = False
    k: int = 2


@dataclass(frozen=True)
class Layers:
    """How a network normalizes: makes its convolutions, norms and activations.

    With "kernel" every convolution is a KNConv and no norm stands beside the activations. With any other norm the
    same network is built of plain convolutions, each activation with a norm before it.

    Args:
        norm: name of the normalization, as for :func:`knlightning.nn.make_norm`.
        dropout_p: dropout probability of KNConv; that of the head's KernelNorm is five times as high, at most
            `most_head_dropout`.
        activation: name of the activation.
        eval_statistics: evaluation statistics of the kernel normalized layers.
        bias: whether plain convolutions have a bias; KNConvs always have one.
        most_head_dropout: largest dropout probability of the head's KernelNorm.

    Raises:
        ValueError: if an argument is out of its range.
    """

    norm: Norm = "kernel"
    dropout_p: float = 0.05
    activation: Activation = "relu"
    eval_statistics: EvalStatistics = "clean"
    bias: bool = True
    most_head_dropout: float = 0.25

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, got {self.norm!r}")

    @property
    def fused(self) -> bool:
        """Whether activations and sums are left to the convolutions, which then keep half as much for backward."""
        return self.norm == "kernel" and self.activation == "relu"

    def conv(self, in_channels: int, out_channels: int, k: int, stride: int = 1, padding: Padding = 0) -> nn.Module:
        """Make a convolution, kernel normalized if the network is."""
        if self.norm == "kernel":
            return KNConv2d(
                in_channels,
                out_channels,
                k,
                stride,
                padding,
                dropout_p=self.dropout_p,
                eval_statistics=self.eval_statistics,
            )
        around = padding if isinstance(padding, int) else 0
        conv = nn.Conv2d(in_channels, out_channels, k, stride, around, bias=self.bias)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        return conv if isinstance(padding, int) else nn.Sequential(nn.ZeroPad2d(padding), conv)

    def norm_act(self, channels: int) -> nn.Module:
        """Make an activation, after a norm unless that is the convolution's."""
        activation = make_activation(self.activation)
        if self.norm in ("kernel", "none"):
            return activation
        return nn.Sequential(make_norm(self.norm, channels), activation)

    def head_norm(self) -> KernelNorm2d:
        """Make the KernelNorm of a kernel normalized network's head."""
        dropout_p = min(5 * self.dropout_p, self.most_head_dropout)
        return KernelNorm2d(1, dropout_p=dropout_p, eval_statistics=self.eval_statistics)

    def head(self, channels: int) -> nn.Module:
        """Make what stands before the global average pooling, or before the classifier of each position."""
        if self.norm != "kernel":
            return self.norm_act(channels)
        return nn.Sequential(self.head_norm(), make_activation(self.activation))


class BasicBlock(nn.Module):
    """Two convolutions, 2x2 or 3x3, around the identity (Figure 3)."""

    def __init__(self, channels: int, inner: int, layers: Layers, k: int = 2) -> None:
        super().__init__()
        self.fused = layers.fused
        self.act1 = layers.norm_act(channels)
        self.conv1 = layers.conv(channels, inner, k, padding=1)
        self.act2 = layers.norm_act(inner)
        self.conv2 = layers.conv(inner, channels, k, padding=k - 2)  # 2x2 takes away what the first has added

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return self.conv2(self.conv1(x, relu_input=True, relu_output=True), residual=x)
        return x + self.conv2(self.act2(self.conv1(self.act1(x))))


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 2x2, or of 1x1, around the identity (Figure 3)."""

    def __init__(self, channels: int, inner: int, layers: Layers, pointwise: bool = False) -> None:
        super().__init__()
        self.fused = layers.fused
        outer = 1 if pointwise else 2
        self.act1 = layers.norm_act(channels)
        self.conv1 = layers.conv(channels, inner, outer, padding=outer - 1)
        self.act2 = layers.norm_act(inner)
        self.conv2 = layers.conv(inner, inner, 3, padding=1)
        self.act3 = layers.norm_act(inner)
        self.conv3 = layers.conv(inner, channels, outer)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            out = self.conv2(self.conv1(x, relu_input=True, relu_output=True), relu_output=True)
            return self.conv3(out, residual=x)
        out = self.conv2(self.act2(self.conv1(self.act1(x))))
        return x + self.conv3(self.act3(out))


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
        self.fused = layers.fused

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return self[2](self[1](x, relu_input=True, keep_output=True))
        return super().forward(x)


class Stem(nn.Sequential):
    """A convolution of the image, pooled unless the image is small."""

    def __init__(self, channels: int, low_resolution: bool, layers: Layers) -> None:
        if low_resolution:
            super().__init__(layers.conv(3, channels, 3, padding=1), nn.Identity())
        else:
            super().__init__(layers.conv(3, channels, 7, stride=2, padding=3), nn.MaxPool2d(3, 2, 1))
        self.fused = layers.fused

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return self[1](self[0](x, keep_output=True))
        return super().forward(x)


class KNTrunk(nn.Module):
    """Stem and stages of a kernel normalized residual network.

    Maps images [N, 3, H, W], floating point, to features [N, channels of the last stage, h, w]. Source: Nasirigerdeh
    et al. (TMLR 2024), Figures 3 and 5.

    Args:
        stages: the stages; the stem has the channels of the first.
        bottleneck: whether the blocks are bottlenecks.
        low_resolution: a 3x3 stem without pooling, for images such as 32x32, in place of 7x7 with.
        layers: how the network normalizes.
        overlapping: between the stages, take maxima of 3x3 with padding in place of 2x2: for images of any size.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        bottleneck: bool,
        low_resolution: bool,
        layers: Layers,
        overlapping: bool = False,
    ) -> None:
        super().__init__()
        self.stem = Stem(stages[0].channels, low_resolution, layers)
        # 2x2 windows pad one side more than the other; the sides alternate. (left, right, top, bottom)
        pads: list[Padding] = [(1, 0, 1, 0), (0, 1, 0, 1), (1, 0, 1, 0) if low_resolution else (2, 1, 2, 1)]
        self.transitions = nn.ModuleList()
        self.stages = nn.ModuleList()
        for i, stage in enumerate(stages):
            if i > 0:
                k = 1 if stage.pointwise else stage.k
                padding = pads[i - 1] if k == 2 else k // 2
                pool = nn.MaxPool2d(3, 2, 1) if overlapping else nn.MaxPool2d(2)
                self.transitions.append(Transition(stages[i - 1].channels, stage.channels, k, padding, layers, pool))
            if bottleneck:
                blocks = [Bottleneck(stage.channels, stage.inner, layers, stage.pointwise) for _ in range(stage.blocks)]
                self.stages.append(nn.Sequential(*blocks))
            else:
                basic = [BasicBlock(stage.channels, stage.inner, layers, stage.k) for _ in range(stage.blocks)]
                self.stages.append(nn.Sequential(*basic))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages[0](self.stem(x))
        for transition, stage in zip(self.transitions, self.stages[1:], strict=True):
            x = stage(transition(x))
        return x


class KNResNet(KNTrunk):
    """Kernel normalized residual network for classification.

    Maps images [N, 3, H, W], floating point, to logits [N, num_classes]. Source: Nasirigerdeh et al. (TMLR 2024),
    Figure 5.

    Args:
        stages: the stages; the stem has the channels of the first.
        bottleneck: whether the blocks are bottlenecks.
        tail_channels: filters of a last convolution after one more pooling, or None for no such layers.
        num_classes: number of classes.
        low_resolution: a 3x3 stem without pooling, for images such as 32x32, in place of 7x7 with.
        layers: how the network normalizes.
        pooled: height and width to which the features are averaged before the linear layer.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        bottleneck: bool,
        tail_channels: int | None,
        num_classes: int,
        low_resolution: bool,
        layers: Layers,
        pooled: int = 1,
    ) -> None:
        check_num_classes(num_classes)
        super().__init__(stages, bottleneck, low_resolution, layers)
        channels = stages[-1].channels
        self.tail: nn.Module = nn.Identity()
        if tail_channels is not None:
            conv = layers.conv(channels, tail_channels, 2, padding=1 if low_resolution else 0)
            self.tail = nn.Sequential(nn.MaxPool2d(2), layers.norm_act(channels), conv)
            channels = tail_channels
        self.head = layers.head(channels)
        self.pool = nn.AdaptiveAvgPool2d(pooled)
        self.fc = nn.Linear(channels * pooled**2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.tail(super().forward(x)))
        return self.fc(torch.flatten(self.pool(x), 1))


def check_num_classes(num_classes: int) -> None:
    """Check a number of classes.

    Raises:
        ValueError: if there is none.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")


def knresnet8(
    num_classes: int = 10,
    low_resolution: bool = True,
    dropout_p: float = 0.05,
    activation: Activation = "relu",
    norm: Norm = "kernel",
    eval_statistics: EvalStatistics = "clean",
) -> KNResNet:
    """Make a small member of the family, with one basic block a stage, that a laptop trains in a minute.

    Not in the paper. Arguments as in :func:`knresnet18`.
    """
    stages = (Stage(16, 1, 32), Stage(32, 1, 64), Stage(64, 1, 128))
    layers = Layers(norm, dropout_p, activation, eval_statistics)
    return KNResNet(stages, False, None, num_classes, low_resolution, layers)


def knresnet13(
    num_classes: int = 10,
    low_resolution: bool = True,
    dropout_p: float = 0.05,
    activation: Activation = "relu",
    norm: Norm = "kernel",
    eval_statistics: EvalStatistics = "clean",
) -> KNResNet:
    """Make a KNResNet-13, a network for private training on small images.

    A basic block at each of 64, 64, 128 and 256 channels, all of 3x3 convolutions, and 2x2 averages before the linear
    layer. Arguments as in :func:`knresnet18`. Source: Nasirigerdeh et al., Kernel Normalized Convolutional Networks
    for Privacy-Preserving Machine Learning (2023), whose code has dropout probabilities of 0.1, and 0.5 in the head.
    """
    stages = (Stage(64, 1, 64, k=3), Stage(64, 1, 64, k=3), Stage(128, 1, 128, k=3), Stage(256, 1, 256, k=3))
    layers = Layers(norm, dropout_p, activation, eval_statistics)
    return KNResNet(stages, False, None, num_classes, low_resolution, layers, pooled=2)


def knresnet18(
    num_classes: int = 1000,
    low_resolution: bool = False,
    dropout_p: float = 0.05,
    activation: Activation = "relu",
    norm: Norm = "kernel",
    eval_statistics: EvalStatistics = "clean",
) -> KNResNet:
    """Make a KNResNet-18 (Nasirigerdeh et al., TMLR 2024, Figure 5b).

    Args:
        num_classes: number of classes.
        low_resolution: a 3x3 stem without pooling, for images such as 32x32, in place of 7x7 with.
        dropout_p: dropout probability of KNConv in [0, 1); that of the head's KernelNorm is five times as high, at
            most 0.25.
        activation: name of the activation.
        norm: "kernel"; for comparison any other, by which the same network is built of plain convolutions. The groups
            of "group" and of "local_context" do not divide the channels of all of these networks.
        eval_statistics: evaluation statistics of the kernel normalized layers.

    Raises:
        ValueError: if an argument is out of its range.
    """
    stages = (Stage(64, 2, 256), Stage(256, 2, 256), Stage(512, 1, 512), Stage(724, 1, 724))
    layers = Layers(norm, dropout_p, activation, eval_statistics)
    return KNResNet(stages, False, 512, num_classes, low_resolution, layers)


def knresnet34(
    num_classes: int = 1000,
    low_resolution: bool = False,
    dropout_p: float = 0.05,
    activation: Activation = "relu",
    norm: Norm = "kernel",
    eval_statistics: EvalStatistics = "clean",
) -> KNResNet:
    """Make a KNResNet-34 (Nasirigerdeh et al., TMLR 2024, Figure 5c); arguments as in :func:`knresnet18`."""
    stages = (Stage(64, 4, 256), Stage(256, 5, 320), Stage(512, 3, 640), Stage(512, 2, 843))
    layers = Layers(norm, dropout_p, activation, eval_statistics)
    return KNResNet(stages, False, 512, num_classes, low_resolution, layers)


def knresnet50(
    num_classes: int = 1000,
    low_resolution: bool = False,
    dropout_p: float = 0.05,
    activation: Activation = "relu",
    norm: Norm = "kernel",
    eval_statistics: EvalStatistics = "clean",
) -> KNResNet:
    """Make a KNResNet-50 (Nasirigerdeh et al., TMLR 2024, Figure 5d); arguments as in :func:`knresnet18`."""
    stages = (Stage(256, 4, 64), Stage(512, 5, 128), Stage(810, 4, 201), Stage(2048, 2, 512, pointwise=True))
    layers = Layers(norm, dropout_p, activation, eval_statistics)
    return KNResNet(stages, True, None, num_classes, low_resolution, layers)
