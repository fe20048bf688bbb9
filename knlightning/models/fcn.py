"""Fully convolutional networks for semantic segmentation, kernel normalized or on torchvision's ResNets.

Source of the idea: Long et al., Fully Convolutional Networks for Semantic Segmentation (CVPR 2015); of the kernel
normalized backbones: Nasirigerdeh et al. (TMLR 2024), section 4.2. The channels are those by which the numbers of
parameters of Table 3 are met: 13.525, 23.399 and 32.874 M for kernel normalized networks, 13.547, 23.655 and 32.955 M
for the ResNets.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet

from knlightning.models.knresnet import KNTrunk, Layers, Stage, Transition, check_num_classes
from knlightning.models.resnet import resnet8_layers, resnet18, resnet34, resnet50
from knlightning.nn import Activation, Norm
from knlightning.nn.functional import EvalStatistics

CHANNELS = 512
"""Features before the classifier."""
DROPOUT = 0.1
"""Dropout probability of the features."""
MOST_HEAD_DROPOUT = 0.5
"""Largest dropout probability of the KernelNorm before the classifier; the paper's."""


class FCN(nn.Module):
    """A backbone and a classifier of its every position, whose logits are brought to the size of the image.

    Maps images [N, 3, H, W] of any size, floating point, to logits [N, num_classes, H, W].

    Args:
        backbone: network from images to features [N, channels, h, w].
        head: layers from the features to logits [N, num_classes, h, w].
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        logits = self.head(self.backbone(images))
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)


def _fcn_knresnet(
    stages: Sequence[Stage],
    bottleneck: bool,
    tail: bool,
    low_resolution: bool,
    num_classes: int,
    dropout_p: float,
    activation: Activation,
    norm: Norm,
    eval_statistics: EvalStatistics,
) -> FCN:
    check_num_classes(num_classes)
    layers = Layers(norm, dropout_p, activation, eval_statistics, most_head_dropout=MOST_HEAD_DROPOUT)
    channels = stages[-1].channels
    backbone: nn.Module = KNTrunk(stages, bottleneck, low_resolution, layers, overlapping=True)
    if tail:
        backbone = nn.Sequential(backbone, Transition(channels, channels, 3, 1, layers, pool=nn.Identity()))
    return FCN(backbone, nn.Sequential(layers.head(channels), nn.Dropout(DROPOUT), nn.Conv2d(channels, num_classes, 1)))


def fcn_knresnet8(
    num_classes: int = 11,
    dropout_p: float = 0.0,
    activation: Activation = "relu",
    norm: Norm = "kernel",
    eval_statistics: EvalStatistics = "clean",
) -> FCN:
    """Make a small member of the family, with logits for each 4x4 pixels; the groups of every norm divide its channels.

    Not in the paper; a laptop trains it on small scenes in minutes. At the full resolution there is no block, as that
    costs most, and no dropout, which makes a network that small learn more slowly. Arguments as in
    :func:`fcn_knresnet18`.
    """
    stages = (Stage(32, 0, 32), Stage(32, 1, 32, k=3), Stage(64, 1, 64, k=3))
    return _fcn_knresnet(stages, False, False, True, num_classes, dropout_p, activation, norm, eval_statistics)


def fcn_knresnet18(
    num_classes: int = 19,
    dropout_p: float = 0.1,
    activation: Activation = "relu",
    norm: Norm = "kernel",
    eval_statistics: EvalStatistics = "clean",
) -> FCN:
    """Make a fully convolutional KNResNet-18, with logits for each 32x32 pixels (Nasirigerdeh et al., TMLR 2024).

    It maps images [N, 3, H, W] of any size to logits [N, num_classes, H, W].

    Args:
        num_classes: number of classes.
        dropout_p: dropout probability of KNConv in [0, 1); that of the head's KernelNorm is five times as high, at
            most 0.5.
        activation: name of the activation.
        norm: "kernel"; for comparison any other, by which the same network is built of plain convolutions. The groups
            of "group" and of "local_context" do not divide the channels of all of these networks.
        eval_statistics: evaluation statistics of the kernel normalized layers.

    Raises:
        ValueError: if an argument is out of its range.
    """
    stages = (Stage(64, 2, 128, k=3), Stage(128, 2, 256, k=3), Stage(256, 2, 512, k=3), Stage(512, 1, 625, k=3))
    return _fcn_knresnet(stages, False, False, False, num_classes, dropout_p, activation, norm, eval_statistics)


def fcn_knresnet34(
    num_classes: int = 19,
    dropout_p: float = 0.1,
    activation: Activation = "relu",
    norm: Norm = "kernel",
    eval_statistics: EvalStatistics = "clean",
) -> FCN:
    """Make a fully convolutional KNResNet-34; arguments as in :func:`fcn_knresnet18`."""
    stages = (Stage(64, 4, 128, k=3), Stage(128, 4, 256, k=3), Stage(256, 4, 256, k=3), Stage(512, 3, 512, k=3))
    return _fcn_knresnet(stages, False, False, False, num_classes, dropout_p, activation, norm, eval_statistics)


def fcn_knresnet50(
    num_classes: int = 19,
    dropout_p: float = 0.1,
    activation: Activation = "relu",
    norm: Norm = "kernel",
    eval_statistics: EvalStatistics = "clean",
) -> FCN:
    """Make a fully convolutional KNResNet-50, of bottlenecks and a last 3x3 convolution.

    Arguments as in :func:`fcn_knresnet18`.
    """
    stages = (Stage(64, 4, 128, k=3), Stage(128, 4, 256, k=3), Stage(256, 4, 458, k=3), Stage(512, 3, 512, k=3))
    return _fcn_knresnet(stages, True, True, False, num_classes, dropout_p, activation, norm, eval_statistics)


def _head(in_channels: int, channels: int, num_classes: int, layers: Layers) -> nn.Sequential:
    return nn.Sequential(
        layers.conv(in_channels, channels, 3, padding=1),
        layers.norm_act(channels),
        nn.Dropout(DROPOUT),
        nn.Conv2d(channels, num_classes, 1),
    )


def _fcn_resnet(
    make: Callable[..., ResNet], num_classes: int, norm: Norm, activation: Activation, dropout_p: float
) -> FCN:
    check_num_classes(num_classes)
    resnet = make(1, norm, activation=activation, dropout_p=dropout_p)
    trunk = OrderedDict((name, layer) for name, layer in resnet.named_children() if name not in ("avgpool", "fc"))
    layers = Layers(norm, dropout_p, activation, bias=norm == "none")
    return FCN(nn.Sequential(trunk), _head(resnet.fc.in_features, CHANNELS, num_classes, layers))


def fcn_resnet8(
    num_classes: int = 11, norm: Norm = "batch", activation: Activation = "relu", dropout_p: float = 0.1
) -> FCN:
    """Make a fully convolutional :func:`knlightning.models.resnet8` of half its width, with logits for 4x4 pixels.

    Not in the paper; a laptop trains it on small scenes in minutes. Arguments as in :func:`fcn_resnet18`.
    """
    check_num_classes(num_classes)
    layers = Layers(norm, dropout_p, activation, bias=norm == "none")
    return FCN(nn.Sequential(*resnet8_layers(32, True, layers, ceil_mode=True)), _head(128, 128, num_classes, layers))


def fcn_resnet18(
    num_classes: int = 19, norm: Norm = "batch", activation: Activation = "relu", dropout_p: float = 0.1
) -> FCN:
    """Make an FCN on a ResNet-18, with logits for each 32x32 pixels, as the paper's competitors are built.

    It maps images [N, 3, H, W] of any size to logits [N, num_classes, H, W]. Its backbone has the names of the
    parameters of torchvision's ResNet.

    Args:
        num_classes: number of classes.
        norm: name of the normalization, as for :func:`knlightning.nn.make_norm`, but "kernel" makes each convolution
            and its norm a KNConv. The convolutions of "kernel" and "none" have a bias, as no other layer adds one.
        activation: name of the activation.
        dropout_p: dropout probability of KNConv in [0, 1); of no effect with other norms.

    Raises:
        ValueError: if an argument is out of its range.
    """
    return _fcn_resnet(resnet18, num_classes, norm, activation, dropout_p)


def fcn_resnet34(
    num_classes: int = 19, norm: Norm = "batch", activation: Activation = "relu", dropout_p: float = 0.1
) -> FCN:
    """Make an FCN on a ResNet-34; arguments as in :func:`fcn_resnet18`."""
    return _fcn_resnet(resnet34, num_classes, norm, activation, dropout_p)


def fcn_resnet50(
    num_classes: int = 19, norm: Norm = "batch", activation: Activation = "relu", dropout_p: float = 0.1
) -> FCN:
    """Make an FCN on a ResNet-50; arguments as in :func:`fcn_resnet18`."""
    return _fcn_resnet(resnet50, num_classes, norm, activation, dropout_p)
