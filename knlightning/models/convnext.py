"""ConvNeXt-Tiny, plain and kernel normalized."""

from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.convnext import ConvNeXt as TorchvisionConvNeXt

from knlightning.checks import check_number
from knlightning.models.classifier import Classifier
from knlightning.models.registry import register
from knlightning.models.replaceable import knconv_of
from knlightning.nn.functional import EvalStatistics


class ConvNeXt(Classifier, TorchvisionConvNeXt):
    """Torchvision's network, with the names of its parameters."""

    features: nn.Sequential
    avgpool: nn.Module
    classifier: nn.Sequential
    last_name = "classifier.2"

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images to the features before the average pooling."""
        return self.features(x)

    def pooled(self, features: Tensor) -> Tensor:
        """Average and normalize the features."""
        return self.classifier[1](self.classifier[0](self.avgpool(features)))


@register(tables=("convnext",))
def convnext_tiny(*, num_classes: int = 1000) -> ConvNeXt:
    """Make torchvision's ConvNeXt-Tiny, which maps images [N, 3, H, W] to logits [N, num_classes].

    Source: Liu et al., A ConvNet for the 2020s (CVPR 2022).

    Args:
        num_classes: Number of classes.

    Raises:
        ArgumentError: If num_classes is below 1.
    """
    check_number("num_classes", num_classes, at_least=1, integer=True)
    stages = ((96, 192, 3), (192, 384, 3), (384, 768, 9), (768, None, 3))
    model = ConvNeXt([CNBlockConfig(*stage) for stage in stages], stochastic_depth_prob=0.1, num_classes=num_classes)
    model.num_features = 768
    return model


@register(tables=("convnext",))
def knconvnext_tiny(
    *,
    num_classes: int = 1000,
    dropout_p: float = 0.1,
    eps: float = 1e-5,
    eval_statistics: EvalStatistics = "expected",
) -> ConvNeXt:
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
