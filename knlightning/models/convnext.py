"""ConvNeXt-Tiny, plain and kernel normalized."""

from typing import cast

import torchvision
from torch import nn

from knlightning.models.knresnet import check_num_classes
from knlightning.models.replaceable import knconv_of


def convnext_tiny(num_classes: int = 1000) -> nn.Module:
    """Make torchvision's ConvNeXt-Tiny, which maps images [N, 3, H, W] to logits [N, num_classes].

    Source: Liu et al., A ConvNet for the 2020s (CVPR 2022).

    Args:
        num_classes: number of classes.

    Raises:
        ValueError: if num_classes is below 1.
    """
    check_num_classes(num_classes)
    return cast(nn.Module, torchvision.models.convnext_tiny(weights=None, num_classes=num_classes))


def knconvnext_tiny(num_classes: int = 1000, dropout_p: float = 0.1) -> nn.Module:
    """Make a ConvNeXt-Tiny with the three downsampling layers, norm and convolution, replaced by ReLU and KNConv.

    All weights, those of KNConv too, are drawn as ConvNeXt's are: truncated normal with deviation 0.02; biases are
    zero. Source: Nasirigerdeh et al. (TMLR 2024), section 5.

    Args:
        num_classes: number of classes.
        dropout_p: dropout probability of KNConv in [0, 1).

    Raises:
        ValueError: if an argument is out of its range.
    """
    model = convnext_tiny(num_classes)
    for i in (2, 4, 6):
        conv = model.get_submodule(f"features.{i}.1")
        assert isinstance(conv, nn.Conv2d)
        model.set_submodule(f"features.{i}", nn.Sequential(nn.ReLU(), knconv_of(conv, dropout_p=dropout_p)))
    return model
