"""Networks that were trained before, prepared to be trained on other images."""

from collections.abc import Sequence

from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from knlightning.checks import check_number
from knlightning.models.lora import add_lora
from knlightning.models.weights import load_weights


def fine_tuned(
    backbone: nn.Module,
    num_classes: int,
    weights: str | None = None,
    train: Sequence[str] | None = (),
    lora_rank: int = 0,
) -> nn.Module:
    """Freeze a pretrained network in part, and give it a new last layer.

    Batch normalization becomes `torchvision.ops.FrozenBatchNorm2d`, which computes with the statistics of before. So
    no sample changes another, and the network can be trained privately.

    Args:
        backbone: The network, as pretrained by torchvision or timm, or made for `weights`. It is changed in place.
        num_classes: Number of outputs of the new last layer, which takes the place of the last linear layer.
        weights: File of weights to load first, as in `knlightning.models.load_weights`.
        train: Names of modules and parameters that are trained beside the new layer; None for all of the network.
        lora_rank: Rank of `knlightning.models.lora.LoRA` around linear layers and convolutions of 1x1; 0 for none.

    Returns:
        The network.

    Raises:
        ArgumentError: If an argument is out of its range.
        ValueError: If the weights do not fit, a name is unknown, there is no last layer, or batch normalization cannot
            be frozen.
    """
    check_number("num_classes", num_classes, at_least=1, integer=True)
    check_number("lora_rank", lora_rank, at_least=0, integer=True)
    if weights is not None:
        load_weights(backbone, weights)
    linear = [(name, layer) for name, layer in backbone.named_modules() if type(layer) is nn.Linear]
    if not linear:
        raise ValueError(f"this {type(backbone).__name__} has no linear layer to replace by one of the new classes")
    name, last = linear[-1]
    head = nn.Linear(last.in_features, num_classes, last.bias is not None).to(last.weight)
    if not name:
        return head
    backbone.set_submodule(name, head)
    _freeze_norms(backbone)
    if train is not None:
        _freeze(backbone, train)
        head.requires_grad_()
    if lora_rank:
        add_lora(backbone, lora_rank, but=[head])
    return backbone


def _freeze_norms(network: nn.Module) -> None:
    for name, norm in list(network.named_modules()):
        if not isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)):
            continue
        if type(norm) is not nn.BatchNorm2d or norm.running_mean is None:
            raise ValueError(
                f"{name} ({type(norm).__name__}) cannot be frozen: use timm.layers.freeze_batch_norm_2d"
                " for layers of timm before, or knlightning.models.kernel_normalize"
            )
        frozen = FrozenBatchNorm2d(norm.num_features, norm.eps).to(norm.running_mean)
        frozen.load_state_dict(norm.state_dict(), strict=norm.affine)
        network.set_submodule(name, frozen)


def _freeze(network: nn.Module, train: Sequence[str]) -> None:
    """Freeze all parameters but those with one of the names, or in a module with one."""
    unknown = set(train)
    for name, parameter in network.named_parameters():
        within = {each for each in train if f"{name}.".startswith(f"{each}.")}
        parameter.requires_grad_(bool(within))
        unknown -= within
    if unknown:
        parts = ", ".join(name for name, _ in network.named_children())
        raise ValueError(f"train: nothing with parameters is named {', '.join(sorted(unknown))}; it has {parts}")
