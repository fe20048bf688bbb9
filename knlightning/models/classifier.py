"""What the networks for classification have in common with those of timm: their features, and another last layer."""

from typing import Any

from torch import Tensor, nn

from knlightning.checks import check_number
from knlightning.models.hub import HubModel


class Classifier(HubModel):
    """Base of networks from images to logits, with the methods by which timm's networks are used.

    Attributes:
        last_name: Name of the last layer, a linear one.
        num_features: Channels of the features.
    """

    last_name: str = "fc"
    num_features: int

    @property
    def head_hidden_size(self) -> int:
        """Number of features that the last layer gets."""
        last: Any = self.get_classifier()
        return int(last.in_features)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to features [N, num_features, h, w]."""
        raise NotImplementedError

    def pooled(self, features: Tensor) -> Tensor:
        """Map features [N, num_features, h, w] to what the last layer gets [N, head_hidden_size]."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features [N, num_features, h, w] to logits [N, num_classes], or to what the last layer gets."""
        x = self.pooled(x)
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.get_submodule(self.last_name)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last layer.

        Args:
            num_classes: Number of outputs of the new one; 0 for none, so that the network returns features.

        Raises:
            ArgumentError: If the number is below 0.
        """
        check_number("num_classes", num_classes, at_least=0, integer=True)
        size = self.head_hidden_size
        new: Any = nn.Linear(size, num_classes) if num_classes else nn.Identity()
        new.in_features = size
        self.set_submodule(self.last_name, new.to(next(self.parameters())))
