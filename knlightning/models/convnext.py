"""ConvNeXt-Tiny, plain and kernel normalized."""

from typing import cast

import torchvision
from torch import nn

from knlightning.checks import check_number
from knlightning.models.registry import register
from knlightning.models.replaceable import knconv_of
from knlightning.nn.functional import EvalStatistics


@register(tables=("convnext",))
def convnext_tiny(*, num_classes: int = 1000) -> nn.Module:
    """Make torchvision's ConvNeXt-Tiny, which maps images [N, 3, H, W] to logits [N, num_classes].

    Source: Liu et al., A ConvNet for the 2020s (CVPR 2022).

    Args:
        num_classes: Number of classes.

    Raises:
        ArgumentError: If num_classes is below 1.
    """
    check_number("num_classes", num_classes, at_least=1, integer=True)
    return cast(nn.Module, torchvision.models.convnext_tiny(weights=None, num_classes=num_classes))


@register(tables=("convnext",))
def knconvnext_tiny(
    *,
    num_classes: int = 1000,
    dropout_p: float = 0.1,
    eps: float = 1e-5,
    eval_statistics: EvalStatistics = "expected",
) -> nn.Module:
    """Make a ConvNeXt-Tiny with the three downsampling layers, norm and convolution, replaced by ReLU and KNConv.

    All weights, those of KNConv too, are drawn as ConvNeXt's are: truncated normal with deviation 0.02; biases are
    zero. Source: Nasirigerdeh et al. (TMLR 2024), section 5.

    Args:
        num_classes: Number of classes.
        dropout_p: Dropout probability of KNConv in [0, 1).
        eps: Added to the variance in KNConv.
        eval_statistics: The moments that KNConv uses in evaluation, as in `knlightning.nn.KNConv2d`.

    Raises:
        ArgumentError: If an argument is out of its range.
    """
    model = convnext_tiny(num_classes=num_classes)
    for i in (2, 4, 6):
        conv = model.get_submodule(f"features.{i}.1")
        assert isinstance(conv, nn.Conv2d)
        layer = knconv_of(conv, dropout_p=dropout_p, eps=eps, eval_statistics=eval_statistics)
        model.set_submodule(f"features.{i}", nn.Sequential(nn.ReLU(), layer))
    return model
