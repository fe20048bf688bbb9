"""Residual networks with any normalization: torchvision's, and a small one for private training.

With the norms "kernel" and "none" the convolutions have a bias, as no other layer adds one.
"""

from collections.abc import Sequence

import torch
import torchvision.models.resnet as torchvision_resnet
from torch import Tensor, nn

from knlightning.models.classifier import Classifier
from knlightning.models.knresnet import KNResNet, knresnet13
from knlightning.models.layers import Layers, Options, interchange
from knlightning.models.registry import register, with_arguments_of


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


class ResNet(Classifier, torchvision_resnet.ResNet):
    """Torchvision's network, with the names of its parameters."""

    fc: nn.Linear

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images to the features before the average pooling."""
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            x = self.get_submodule(name)(x)
        return x

    def pooled(self, features: Tensor) -> Tensor:
        """Average the features."""
        return torch.flatten(self.get_submodule("avgpool")(features), 1)


def torchvision_network(block: type[BasicBlock] | type[Bottleneck], blocks: Sequence[int], options: Options) -> ResNet:
    """Make a ResNet as torchvision does, whose names of parameters it has.

    It maps images [N, 3, H, W] to logits [N, num_classes].

    Args:
        block: Type of the residual blocks.
        blocks: Number of blocks in each of the four stages.
        options: Options of the network.
    """
    layers = Layers(options, bias=options.norm == "none")
    model = ResNet(block, list(blocks), options.num_classes)
    model.num_features = model.fc.in_features
    if options.low_resolution:
        model.conv1, model.maxpool = layers.conv(3, 64, 3, padding=1), nn.Identity()
    interchange(model, layers)
    return model


@register(tables=("1", "2", "4", "cifar10"))
@with_arguments_of(Options, norm="batch")
def resnet18(options: Options) -> ResNet:
    """Make a ResNet-18 (He et al., CVPR 2016)."""
    return torchvision_network(BasicBlock, (2, 2, 2, 2), options)


@register(tables=("1", "2"))
@with_arguments_of(Options, norm="batch")
def resnet34(options: Options) -> ResNet:
    """Make a ResNet-34 (He et al., CVPR 2016)."""
    return torchvision_network(BasicBlock, (3, 4, 6, 3), options)


@register(tables=("1", "2"))
@with_arguments_of(Options, norm="batch")
def resnet50(options: Options) -> ResNet:
    """Make a ResNet-50 (He et al., CVPR 2016), with strides in the 3x3 convolutions."""
    return torchvision_network(Bottleneck, (3, 4, 6, 3), options)


@register()
@with_arguments_of(Options, norm="batch")
def resnet101(options: Options) -> ResNet:
    """Make a ResNet-101 (He et al., CVPR 2016)."""
    return torchvision_network(Bottleneck, (3, 4, 23, 3), options)


@register()
@with_arguments_of(Options, norm="batch")
def resnet152(options: Options) -> ResNet:
    """Make a ResNet-152 (He et al., CVPR 2016)."""
    return torchvision_network(Bottleneck, (3, 8, 36, 3), options)


class _Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ResNet8(Classifier, nn.Sequential):
    """The layers of a ResNet-8, one after the other."""

    last_name = "11"
    num_features = 256

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images to the normalized features before the average pooling."""
        for layer in self[:9]:
            x = layer(x)
        return x

    def pooled(self, features: Tensor) -> Tensor:
        """Average the features."""
        return self[10](self[9](features))


@register()
@with_arguments_of(Options, num_classes=10, norm="batch", low_resolution=True)
def resnet8(options: Options) -> ResNet8:
    """Make a ResNet-8, a network for private training on small images, of at least 8x8 pixels.

    3x3 convolutions of 64 and 128 filters, a residual block, one of 256, another block; each is followed by norm and
    activation, and each resolution but the first by pooling. 2x2 averages go into the linear layer, after a
    KernelNorm if the norm is "kernel". Source: Nasirigerdeh et al., Kernel Normalized Convolutional Networks for
    Privacy-Preserving Machine Learning (2023).
    """
    layers = Layers(options, bias=options.norm == "none")
    return ResNet8(
        *resnet8_layers(64, layers),
        nn.MaxPool2d(2),
        layers.head_norm() if options.norm == "kernel" else nn.Identity(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256 * 2 * 2, options.num_classes),
    )


def resnet8_layers(width: int, layers: Layers, ceil_mode: bool = False) -> list[nn.Module]:
    """Make the layers of a ResNet-8 up to its last block.

    They map images [N, 3, H, W] to features [N, 4 * width, H / 4, W / 4], or with the stem for large images to
    [N, 4 * width, H / 16, W / 16].

    Args:
        width: Filters of the first convolution.
        layers: Makes the layers.
        ceil_mode: Whether pooling keeps the last row and column of an odd size, and so takes images of any size.
    """

    def conv(in_channels: int, out_channels: int) -> nn.Sequential:
        return nn.Sequential(layers.conv(in_channels, out_channels, 3, padding=1), layers.norm_act(out_channels))

    stem = conv(3, width)
    if not layers.options.low_resolution:
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


@register()
@with_arguments_of(Options, num_classes=10, norm="batch", low_resolution=True)
def resnet13(options: Options) -> KNResNet:
    """Make a `knlightning.models.knresnet13` with another norm by default."""
    return knresnet13(**vars(options))
