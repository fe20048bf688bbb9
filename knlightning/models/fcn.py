"""Fully convolutional networks for semantic segmentation, kernel normalized or on torchvision's ResNets.

They map images [N, 3, H, W] of any size to logits [N, num_classes, H, W]. The classifier gives logits for each 32x32
pixels, with the stem for small images for each 8x8 (the smallest networks: each 4x4), and they are interpolated.

Source of the idea: Long et al., Fully Convolutional Networks for Semantic Segmentation (CVPR 2015); of the kernel
normalized backbones: Nasirigerdeh et al. (TMLR 2024), section 4.2. The channels are those by which the numbers of
parameters of Table 3 are met: 13.525, 23.399 and 32.874 M for kernel normalized networks, 13.547, 23.655 and 32.955 M
for the ResNets.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from knlightning.models.hub import HubModel
from knlightning.models.knresnet import KNTrunk, Transition
from knlightning.models.layers import Layers, Options, Stage
from knlightning.models.registry import register, with_arguments_of
from knlightning.models.resnet import BasicBlock, Bottleneck, resnet8_layers, torchvision_network

CHANNELS = 512
"""Features before the classifier."""
DROPOUT = 0.1
"""Dropout probability of the features."""
MAX_HEAD_DROPOUT = 0.5
"""Largest dropout probability of the KernelNorm before the classifier; the paper's."""


class FCN(HubModel):
    """A backbone and a classifier of its every position, whose logits are brought to the size of the image.

    Maps images [N, 3, H, W] of any size, floating point, to logits [N, num_classes, H, W].

    Args:
        backbone: Network from images to features [N, channels, h, w].
        head: Layers from the features to logits [N, num_classes, h, w].
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits of every pixel.

        Args:
            images: Floating point tensor [N, 3, H, W] of any size.

        Returns:
            Logits [N, num_classes, H, W].
        """
        logits = self.head(self.backbone(images))
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)


def _fcn_knresnet(stages: Sequence[Stage], options: Options, *, bottleneck: bool = False, tail: bool = False) -> FCN:
    """Make a kernel normalized trunk, with one more 3x3 convolution if there is a tail, and the classifier."""
    layers = Layers(options, max_head_dropout=MAX_HEAD_DROPOUT)
    channels = stages[-1].channels
    backbone: nn.Module = KNTrunk(stages, layers, bottleneck=bottleneck, overlapping=True)
    if tail:
        backbone = nn.Sequential(backbone, Transition(channels, channels, 3, 1, layers, pool=nn.Identity()))
    classifier = nn.Conv2d(channels, options.num_classes, 1)
    return FCN(backbone, nn.Sequential(layers.head(channels), nn.Dropout(DROPOUT), classifier))


@register(task="segmentation")
@with_arguments_of(Options, num_classes=11, low_resolution=True, dropout_p=0.0)
def fcn_knresnet8(options: Options) -> FCN:
    """Make a small member of the family, with logits for each 4x4 pixels; the groups of every norm divide its channels.

    Not in the paper; a laptop trains it on small scenes in minutes. At the full resolution there is no block, as that
    costs most, and no dropout, which makes a network that small learn more slowly.
    """
    return _fcn_knresnet((Stage(32, 0, 32), Stage(32, 1, 32, k=3), Stage(64, 1, 64, k=3)), options)


@register(task="segmentation", tables=("3",))
@with_arguments_of(Options, num_classes=19, dropout_p=0.1)
def fcn_knresnet18(options: Options) -> FCN:
    """Make a fully convolutional KNResNet-18 (Nasirigerdeh et al., TMLR 2024)."""
    stages = (Stage(64, 2, 128, k=3), Stage(128, 2, 256, k=3), Stage(256, 2, 512, k=3), Stage(512, 1, 625, k=3))
    return _fcn_knresnet(stages, options)


@register(task="segmentation", tables=("3",))
@with_arguments_of(Options, num_classes=19, dropout_p=0.1)
def fcn_knresnet34(options: Options) -> FCN:
    """Make a fully convolutional KNResNet-34 (Nasirigerdeh et al., TMLR 2024)."""
    stages = (Stage(64, 4, 128, k=3), Stage(128, 4, 256, k=3), Stage(256, 4, 256, k=3), Stage(512, 3, 512, k=3))
    return _fcn_knresnet(stages, options)


@register(task="segmentation", tables=("3",))
@with_arguments_of(Options, num_classes=19, dropout_p=0.1)
def fcn_knresnet50(options: Options) -> FCN:
    """Make a fully convolutional KNResNet-50, of bottlenecks and a last 3x3 convolution (Nasirigerdeh et al., 2024)."""
    stages = (Stage(64, 4, 128, k=3), Stage(128, 4, 256, k=3), Stage(256, 4, 458, k=3), Stage(512, 3, 512, k=3))
    return _fcn_knresnet(stages, options, bottleneck=True, tail=True)


def _head(in_channels: int, channels: int, layers: Layers) -> nn.Sequential:
    return nn.Sequential(
        layers.conv(in_channels, channels, 3, padding=1),
        layers.norm_act(channels),
        nn.Dropout(DROPOUT),
        nn.Conv2d(channels, layers.options.num_classes, 1),
    )


def _fcn_resnet(block: type[BasicBlock] | type[Bottleneck], blocks: Sequence[int], options: Options) -> FCN:
    """Make an FCN whose backbone has the names of the parameters of torchvision's ResNet."""
    resnet = torchvision_network(block, blocks, replace(options, num_classes=1))  # that layer is left out
    trunk = OrderedDict((name, layer) for name, layer in resnet.named_children() if name not in ("avgpool", "fc"))
    layers = Layers(options, bias=options.norm == "none")
    return FCN(nn.Sequential(trunk), _head(resnet.fc.in_features, CHANNELS, layers))


@register(task="segmentation")
@with_arguments_of(Options, num_classes=11, norm="batch", low_resolution=True, dropout_p=0.1)
def fcn_resnet8(options: Options) -> FCN:
    """Make a fully convolutional `knlightning.models.resnet8` of half its width, with logits for 4x4 pixels.

    Not in the paper; a laptop trains it on small scenes in minutes.
    """
    layers = Layers(options, bias=options.norm == "none")
    return FCN(nn.Sequential(*resnet8_layers(32, layers, ceil_mode=True)), _head(128, 128, layers))


@register(task="segmentation", tables=("3",))
@with_arguments_of(Options, num_classes=19, norm="batch", dropout_p=0.1)
def fcn_resnet18(options: Options) -> FCN:
    """Make an FCN on a ResNet-18, as the paper's competitors are built."""
    return _fcn_resnet(BasicBlock, (2, 2, 2, 2), options)


@register(task="segmentation", tables=("3",))
@with_arguments_of(Options, num_classes=19, norm="batch", dropout_p=0.1)
def fcn_resnet34(options: Options) -> FCN:
    """Make an FCN on a ResNet-34, as the paper's competitors are built."""
    return _fcn_resnet(BasicBlock, (3, 4, 6, 3), options)


@register(task="segmentation", tables=("3",))
@with_arguments_of(Options, num_classes=19, norm="batch", dropout_p=0.1)
def fcn_resnet50(options: Options) -> FCN:
    """Make an FCN on a ResNet-50, as the paper's competitors are built."""
    return _fcn_resnet(Bottleneck, (3, 4, 6, 3), options)
