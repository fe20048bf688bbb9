"""Residual networks with any normalization: torchvision's, and a small one for private training."""

from collections.abc import Sequence
from functools import partial

import torchvision.models.resnet as torchvision_resnet
from torch import Tensor, nn

from knlightning.models.knresnet import Layers, check_num_classes, knresnet13
from knlightning.nn import Activation, Norm, make_activation, make_norm


class BasicBlock(torchvision_resnet.BasicBlock):
    """Torchvision's block, which changes nothing in place, so that hooks may watch every layer."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(torchvision_resnet.Bottleneck):
    """Torchvision's block, which changes nothing in place, so that hooks may watch every layer."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


def _resnet(
    block: type[BasicBlock] | type[Bottleneck],
    blocks: Sequence[int],
    num_classes: int,
    norm: Norm,
    low_resolution: bool,
    activation: Activation,
    dropout_p: float,
) -> torchvision_resnet.ResNet:
    check_num_classes(num_classes)
    layers = Layers(norm, dropout_p, activation, bias=norm == "none")
    norm_layer = partial(make_norm, "none" if norm == "kernel" else norm)
    model = torchvision_resnet.ResNet(block, list(blocks), num_classes, norm_layer=norm_layer)
    if low_resolution:
        model.conv1, model.maxpool = layers.conv(3, 64, 3, padding=1), nn.Identity()
    for module in list(model.modules()):
        if hasattr(module, "relu"):
            module.relu = make_activation(activation)
        for name, conv in list(module.named_children()):
            if norm in ("kernel", "none") and isinstance(conv, nn.Conv2d):
                geometry = (conv.kernel_size[0], conv.stride[0], int(conv.padding[0]))
                module.add_module(name, layers.conv(conv.in_channels, conv.out_channels, *geometry))
    return model


def resnet18(
    num_classes: int = 1000,
    norm: Norm = "batch",
    low_resolution: bool = False,
    activation: Activation = "relu",
    dropout_p: float = 0.05,
) -> torchvision_resnet.ResNet:
    """Make a ResNet-18 (He et al., CVPR 2016) as torchvision does, whose names of parameters it has.

    It maps images [N, 3, H, W] to logits [N, num_classes].

    Args:
        num_classes: number of classes.
        norm: name of the normalization, as for :func:`knlightning.nn.make_norm`, but "kernel" makes each convolution
            and its norm a KNConv. The convolutions of "kernel" and "none" have a bias, as no other layer adds one.
        low_resolution: a 3x3 stem without pooling, for images such as 32x32, in place of 7x7 with.
        activation: name of the activation.
        dropout_p: dropout probability of KNConv in [0, 1); of no effect with other norms.

    Raises:
        ValueError: if an argument is out of its range.
    """
    return _resnet(BasicBlock, (2, 2, 2, 2), num_classes, norm, low_resolution, activation, dropout_p)


def resnet34(
    num_classes: int = 1000,
    norm: Norm = "batch",
    low_resolution: bool = False,
    activation: Activation = "relu",
    dropout_p: float = 0.05,
) -> torchvision_resnet.ResNet:
    """Make a ResNet-34 (He et al., CVPR 2016); arguments as in :func:`resnet18`."""
    return _resnet(BasicBlock, (3, 4, 6, 3), num_classes, norm, low_resolution, activation, dropout_p)


def resnet50(
    num_classes: int = 1000,
    norm: Norm = "batch",
    low_resolution: bool = False,
    activation: Activation = "relu",
    dropout_p: float = 0.05,
) -> torchvision_resnet.ResNet:
    """Make a ResNet-50 (He et al., CVPR 2016; strides in the 3x3 convolutions); arguments as in :func:`resnet18`."""
    return _resnet(Bottleneck, (3, 4, 6, 3), num_classes, norm, low_resolution, activation, dropout_p)


class _Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def resnet8(
    num_classes: int = 10,
    norm: Norm = "batch",
    low_resolution: bool = True,
    activation: Activation = "relu",
    dropout_p: float = 0.05,
) -> nn.Module:
    """Make a ResNet-8, a network for private training on small images, of at least 8x8 pixels.

    3x3 convolutions of 64 and 128 filters, a residual block, one of 256, another block; each is followed by norm and
    activation, and each resolution but the first by pooling. 2x2 averages go into the linear layer, after a
    KernelNorm if the norm is "kernel". Arguments as in :func:`resnet18`; the KernelNorm's dropout probability is five
    times that of KNConv, at most 0.25. Source: Nasirigerdeh et al., Kernel Normalized Convolutional Networks for
    Privacy-Preserving Machine Learning (2023).
    """
    check_num_classes(num_classes)
    layers = Layers(norm, dropout_p, activation, bias=norm == "none")
    return nn.Sequential(
        *resnet8_layers(64, low_resolution, layers),
        nn.MaxPool2d(2),
        layers.head_norm() if norm == "kernel" else nn.Identity(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256 * 2 * 2, num_classes),
    )


def resnet8_layers(width: int, low_resolution: bool, layers: Layers, ceil_mode: bool = False) -> list[nn.Module]:
    """Make the layers of a ResNet-8 up to its last block: to four times the channels, and a quarter of the resolution.

    Args:
        width: filters of the first convolution.
        low_resolution: as in :func:`resnet18`; without, the stem takes the resolution down by 4 more.
        layers: how the network normalizes.
        ceil_mode: whether pooling keeps the last row and column of an odd size, and so takes images of any size.
    """

    def conv(in_channels: int, out_channels: int) -> nn.Sequential:
        return nn.Sequential(layers.conv(in_channels, out_channels, 3, padding=1), layers.norm_act(out_channels))

    stem = conv(3, width)
    if not low_resolution:
        stem = nn.Sequential(layers.conv(3, width, 7, 2, 3), layers.norm_act(width), nn.MaxPool2d(3, 2, 1))
    return [
        stem,
        conv(width, 2 * width),
        nn.MaxPool2d(2, ceil_mode=ceil_mode),
        _Residual(conv(2 * width, 2 * width), conv(2 * width, 2 * width)),
        conv(2 * width, 4 * width),
        nn.MaxPool2d(2, ceil_mode=ceil_mode),
        _Residual(conv(4 * width, 4 * width), conv(4 * width, 4 * width)),
    ]


def resnet13(
    num_classes: int = 10,
    norm: Norm = "batch",
    low_resolution: bool = True,
    activation: Activation = "relu",
    dropout_p: float = 0.05,
) -> nn.Module:
    """Make a :func:`knlightning.models.knresnet13` with another norm by default; arguments as in :func:`resnet18`."""
    return knresnet13(num_classes, low_resolution, dropout_p, activation, norm)
