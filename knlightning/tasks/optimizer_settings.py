"""Settings of optimizers and networks: which of them cannot be learned with, and what decays which parameters."""

import copy
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torchvision.models.feature_extraction import get_graph_node_names

from knlightning.checks import check, check_number
from knlightning.nn.normalization import NORM_TYPES

MOST = {"dampening": 1, "momentum": 1}
"""Settings that lie between 0 and a bound wherever they are numbers."""
LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""What holds the blocks of a network; classes derived from them are blocks."""


def check_settings(optimizer: Optimizer) -> None:
    """Check that the settings of an optimizer are numbers with which it can compute.

    Args:
        optimizer: With its schedule, which may have settings in it.

    Raises:
        ArgumentError: If a number among them is not finite in float32, or dampening or momentum is not in [0, 1].
    """
    for group in optimizer.param_groups:
        for name, setting in group.items():
            parts = enumerate(setting) if isinstance(setting, tuple) else ()
            for key, value in [(name, setting), *((f"{name}[{place}]", part) for place, part in parts)]:
                if isinstance(value, int | float):
                    ok = abs(value) <= torch.finfo(torch.float32).max
                    check(ok, key, value, f"finite in float32 for the optimizer {type(optimizer).__name__}")
                if key in MOST:
                    check_number(key, value, at_least=0, at_most=MOST[key])


def check_layers(network: nn.Module) -> None:
    """Check that the settings of layers, such as a dropout probability, are numbers.

    Raises:
        ArgumentError: If one of them is NaN.
    """
    for path, layer in network.named_modules():
        for name, value in vars(layer).items():
            allowed = f"a number for the layer {path} ({type(layer).__name__})"
            check(not (isinstance(value, float) and value != value), name, value, allowed)


def make_grouped(
    make: Callable[[Any], Optimizer],
    module: nn.Module,
    network: nn.Module,
    norm_weight_decay: float | None,
    bias_weight_decay: float | None,
    layer_decay: float,
) -> Optimizer:
    """Make an optimizer whose settings differ between groups of parameters, if any of them shall.

    Args:
        make: Makes the optimizer.
        module: Module with the parameters to train.
        network: The network in it, by whose depth learning rates decay.
        norm_weight_decay: As in `parameter_groups`.
        bias_weight_decay: As there.
        layer_decay: As there.

    Raises:
        ArgumentError: If the optimizer has no weight decay although one is given.
    """
    if norm_weight_decay is None and bias_weight_decay is None and layer_decay == 1:
        return make(module.parameters())
    depths = block_depths(network) if layer_decay != 1 else None
    optimizer = make(parameter_groups(module, norm_weight_decay, bias_weight_decay, depths, layer_decay))
    if "weight_decay" not in optimizer.defaults:
        allowed = f"null for the optimizer {type(optimizer).__name__}, which has no weight decay"
        check(norm_weight_decay is None, "norm_weight_decay", norm_weight_decay, allowed)
        check(bias_weight_decay is None, "bias_weight_decay", bias_weight_decay, allowed)
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * group.get("lr_scale", 1)
    return optimizer


def parameter_groups(
    module: nn.Module,
    norm_weight_decay: float | None,
    bias_weight_decay: float | None,
    depths: Mapping[Parameter, int] | None = None,
    layer_decay: float = 1,
) -> list[dict[str, Any]]:
    """Group the parameters of a module by their weight decay, and by the scale of their learning rate.

    Normalization layers are those of `knlightning.nn.normalization.NORM_TYPES`, and every other module with
    "Norm" in the name of its class, as torch, torchvision and timm call theirs. Biases are the parameters whose name
    ends in "bias".

    Args:
        module: Module with parameters to train.
        norm_weight_decay: Weight decay of the parameters of normalization layers; None for the optimizer's.
        bias_weight_decay: Weight decay of the remaining biases; None for the optimizer's.
        depths: Number of blocks behind that of a parameter, as `block_depths` counts them; None for one learning rate.
        layer_decay: Factor of the learning rate from each block to the one in front of it; a group has their product as
            `lr_scale`.

    Returns:
        Groups for an optimizer, without empty ones, of the parameters that keep the optimizer's decay, those of the
        norms, the biases; each from the first block to the last, and in the module's order.
    """
    norms = {parameter for layer in module.modules() if is_norm(layer) for parameter in layer.parameters(recurse=False)}
    decays = (None, norm_weight_decay, bias_weight_decay)
    groups: dict[tuple[int, int], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        kind = 2 if bias_weight_decay is not None and name.endswith("bias") else 0
        kind = 1 if norm_weight_decay is not None and parameter in norms else kind
        depth = 0 if depths is None else depths.get(parameter, 0)
        group = groups.setdefault((kind, -depth), {"params": []})
        group["params"].append(parameter)
        if kind:
            group["weight_decay"] = decays[kind]
        if depths is not None:
            group["lr_scale"] = layer_decay**depth
    return [groups[key] for key in sorted(groups)]


def is_norm(layer: nn.Module) -> bool:
    """Say whether a layer is a normalization."""
    return isinstance(layer, NORM_TYPES) or "Norm" in type(layer).__name__


def block_depths(network: nn.Module) -> dict[Parameter, int]:
    """Count the blocks behind that of each parameter of a network: 0 for those of the last layer.

    A block is what stands in a list (`nn.Sequential`, `nn.ModuleList`) and is no list itself, such as a residual block,
    or else a single layer; a normalization belongs to the block in front of it. The order is that of a forward pass; of
    a network that `torch.fx` cannot trace it is that in which the layers were defined.
    """
    order: list[str] = []
    with suppress(Exception):  # whatever the network's code raises on symbolic tensors
        order = get_graph_node_names(copy.deepcopy(network), suppress_diff_warning=True)[1]
    blocks: dict[str, list[Parameter]] = {}
    for name, parameter in network.named_parameters():
        blocks.setdefault(_block_of(network, name), []).append(parameter)
    layers = dict(network.named_modules())
    levels: list[list[Parameter]] = []
    for block in sorted(blocks, key=lambda block: _first(order, block)):
        layer = layers.get(block)
        if not levels or (layer is not None and not is_norm(layer)):
            levels.append([])
        levels[-1] += blocks[block]
    return {parameter: depth for depth, level in enumerate(reversed(levels)) for parameter in level}


def _first(order: list[str], block: str) -> int:
    """Find the first call of a block; what is never called, such as a class token, comes before all."""
    return next((place for place, node in enumerate(order) if f"{node}.".startswith(f"{block}.")), -1)


def _block_of(network: nn.Module, parameter: str) -> str:
    """Name the block of a parameter; a parameter that is not in a layer is one by itself."""
    *path, _ = parameter.split(".")
    module = network
    for depth, part in enumerate(path, 1):
        in_list, module = isinstance(module, LISTS), module.get_submodule(part)
        if in_list and type(module) not in LISTS:
            return ".".join(path[:depth])
    return ".".join(path) or parameter
