"""DenseNets with any normalization (Huang et al., CVPR 2017), with torchvision's names of parameters."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import densenet as torchvision_densenet

from knlightning.models.classifier import Classifier
from knlightning.models.layers import Layers, Options, interchange
from knlightning.models.registry import register, with_arguments_of


class DenseNet(Classifier, torchvision_densenet.DenseNet):
    """Torchvision's DenseNet, which changes nothing in place, so that hooks may watch every layer.

    Maps images [N, 3, H, W] to logits [N, num_classes]. Each convolution of its dense blocks and transitions has norm
    and activation before it; with the norm "kernel" it becomes a KNConv, and the last norm a KernelNorm, as the paper
    has it for residual networks.

    Args:
        blocks: Number of layers in each of the four dense blocks.
        options: Options of the network.
    """

    last_name = "classifier"
    features: nn.Sequential
    classifier: nn.Linear

    def __init__(self, blocks: tuple[int, int, int, int], options: Options) -> None:
        super().__init__(block_config=blocks, num_classes=options.num_classes)
        self.num_features = self.classifier.in_features
        layers = Layers(options, bias=options.norm == "none")
        if options.low_resolution:
            self.features.conv0, self.features.pool0 = layers.conv(3, 64, 3, padding=1), nn.Identity()
        interchange(self, layers)
        if options.norm == "kernel":
            self.features.norm5 = layers.head_norm()
        self.act = layers.act()

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images to the activated features before the average pooling."""
        return self.act(self.features(x))

    def pooled(self, features: Tensor) -> Tensor:
        """Average the features."""
        return torch.flatten(F.adaptive_avg_pool2d(features, 1), 1)


@register()
@with_arguments_of(Options, norm="batch")
def densenet121(options: Options) -> DenseNet:
    """Make a DenseNet-121 (Huang et al., CVPR 2017), or with `norm="kernel"` a KN-DenseNet-121."""
    return DenseNet((6, 12, 24, 16), options)
