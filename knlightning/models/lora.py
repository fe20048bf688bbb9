"""Low-rank adaptation of layers that stay as they are (Hu et al., LoRA, ICLR 2022)."""

from collections.abc import Iterable

from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention

from knlightning.checks import check_number


class LoRA(nn.Module):
    """A frozen layer, to whose output a product of two small layers is added; equation 3 of the paper.

    It begins as the layer itself, since the second of the small layers begins at zero.

    Args:
        layer: A linear layer, or a convolution with a kernel of 1x1 and one group; its parameters are frozen.
        rank: Number of channels between the small layers, at least 1.
        alpha: Factor of their product, over the rank; None for the rank.

    Raises:
        ArgumentError: If the rank is out of its range.
        ValueError: If the layer is another one.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float | None = None) -> None:
        super().__init__()
        check_number("rank", rank, at_least=1, integer=True)
        if not can_adapt(layer):
            raise ValueError(f"LoRA takes a linear layer, or a convolution of 1x1 in one group, got {layer}")
        self.layer = layer.requires_grad_(False)
        self.scale = (rank if alpha is None else alpha) / rank
        if isinstance(layer, nn.Linear):
            down: nn.Module = nn.Linear(layer.in_features, rank, bias=False)
            up: nn.Module = nn.Linear(rank, layer.out_features, bias=False)
        else:
            down = nn.Conv2d(layer.in_channels, rank, 1, bias=False)
            down.stride, down.padding = layer.stride, layer.padding
            up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        nn.init.zeros_(up.get_parameter("weight"))
        self.down, self.up = down.to(layer.weight), up.to(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, and add what the small layers have learned.

        Args:
            x: Input of the layer.

        Returns:
            Tensor of the shape that the layer gives.
        """
        return self.layer(x) + self.scale * self.up(self.down(x))


def can_adapt(layer: nn.Module) -> bool:
    """Whether `LoRA` takes a layer."""
    pointwise = type(layer) is nn.Conv2d and set(layer.kernel_size) == {1} and layer.groups == 1
    return type(layer) is nn.Linear or pointwise


def add_lora(network: nn.Module, rank: int, alpha: float | None = None, but: Iterable[nn.Module] = ()) -> list[str]:
    """Put `LoRA` around the layers of a network that it takes; all else stays as it is.

    The layers inside of `nn.MultiheadAttention` and of the attention in torchvision's Swin are left out, whose weights
    go to functions.

    Args:
        network: It is changed in place.
        rank: As in `LoRA`.
        alpha: As there.
        but: Layers that are left out too.

    Returns:
        The names of the layers.
    """
    left = {id(part) for layer in but for part in layer.modules()}
    for module in network.modules():
        if isinstance(module, (LoRA, nn.MultiheadAttention, ShiftedWindowAttention)):
            left.update(id(part) for part in module.modules())
    found = {name: layer for name, layer in network.named_modules() if id(layer) not in left and can_adapt(layer)}
    for name, layer in found.items():
        assert isinstance(layer, (nn.Linear, nn.Conv2d))
        network.set_submodule(name, LoRA(layer, rank, alpha))
    return list(found)
