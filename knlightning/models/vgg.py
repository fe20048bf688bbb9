"""VGG networks with any normalization (Simonyan and Zisserman, ICLR 2015), with torchvision's names of parameters."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from knlightning.models.classifier import Classifier
from knlightning.models.layers import Layers, Options
from knlightning.models.registry import register, with_arguments_of


class VGG(Classifier, nn.Sequential):
    """The parts of a VGG: `features`, `avgpool`, `flatten` and `classifier`."""

    num_features = 512

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images to the features before the average pooling."""
        return self.get_submodule("features")(x)

    def pooled(self, features: Tensor) -> Tensor:
        """Compute what the last layer gets."""
        x = self.get_submodule("flatten")(self.get_submodule("avgpool")(features))
        for layer in list(self.get_submodule("classifier").children())[:-1]:
            x = layer(x)
        return x


def vgg(convs: Sequence[int], options: Options) -> VGG:
    """Make a VGG, which maps images [N, 3, H, W] to logits [N, num_classes].

    Five stages of 3x3 convolutions with 64, 128, 256, 512 and 512 filters, each followed by norm and activation, and
    each stage by pooling; then three linear layers. For small images the last stage is not pooled, and a single linear
    layer takes the averages.

    Args:
        convs: Number of convolutions in each stage.
        options: Options of the network.
    """
    layers = Layers(options)
    features: list[nn.Module] = []
    channels = 3
    for count, width in zip(convs, (64, 128, 256, 512, 512), strict=True):
        for _ in range(count):
            features += [layers.conv(channels, width, 3, padding=1), layers.norm(width), layers.act()]
            channels = width
        features.append(nn.MaxPool2d(2))
    if options.low_resolution:
        features[-1], side = nn.Identity(), 1
        classifier = nn.Sequential(nn.Linear(channels, options.num_classes))
    else:
        side, width = 7, 4096
        linear = [nn.Linear(channels * side**2, width), nn.Linear(width, width), nn.Linear(width, options.num_classes)]
        for layer in linear:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        hidden = [module for layer in linear[:2] for module in (layer, layers.act(), nn.Dropout(0.5))]
        classifier = nn.Sequential(*hidden, linear[2])
    parts = {
        "features": nn.Sequential(*features),
        "avgpool": nn.AdaptiveAvgPool2d(side),
        "flatten": nn.Flatten(),
        "classifier": classifier,
    }
    network = VGG(OrderedDict(parts))
    network.last_name = f"classifier.{len(classifier) - 1}"
    return network


@register()
@with_arguments_of(Options, norm="batch")
def vgg11(options: Options) -> VGG:
    """Make a VGG-11 (Simonyan and Zisserman, ICLR 2015), or with `norm="kernel"` a KN-VGG-11."""
    return vgg((1, 1, 2, 2, 2), options)


@register()
@with_arguments_of(Options, norm="batch")
def vgg16(options: Options) -> VGG:
    """Make a VGG-16 (Simonyan and Zisserman, ICLR 2015), or with `norm="kernel"` a KN-VGG-16."""
    return vgg((2, 2, 3, 3, 3), options)
