"""Settings of optimizers and networks: which of them cannot be learned with, and what decays which parameters."""

from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from knlightning.checks import check, check_number
from knlightning.nn.normalization import NORM_TYPES

MOST = {"dampening": 1, "momentum": 1}
"""Settings that lie between 0 and a bound wherever they are numbers."""


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

    Args:
        network: Of any layers.

    Raises:
        ArgumentError: If one of them is NaN.
    """
    for path, layer in network.named_modules():
        for name, value in vars(layer).items():
            allowed = f"a number for the layer {path} ({type(layer).__name__})"
            check(not (isinstance(value, float) and value != value), name, value, allowed)


def parameter_groups(
    module: nn.Module, norm_weight_decay: float | None, bias_weight_decay: float | None
) -> list[dict[str, Any]]:
    """Group the parameters of a module by their weight decay.

    Normalization layers are those of `knlightning.nn.normalization.NORM_TYPES`, and every other module with
    "Norm" in the name of its class, as torch, torchvision and timm call theirs. Biases are the parameters whose name
    ends in "bias".

    Args:
        module: Module with parameters to train.
        norm_weight_decay: Weight decay of the parameters of normalization layers; None for the optimizer's.
        bias_weight_decay: Weight decay of the remaining biases; None for the optimizer's.

    Returns:
        Groups for an optimizer, without empty ones: the parameters that keep the optimizer's decay, those of the
        norms, the biases; each in the module's order.
    """
    norms: set[Parameter] = set()
    biases: set[Parameter] = set()
    if norm_weight_decay is not None:
        layers = (m for m in module.modules() if isinstance(m, NORM_TYPES) or "Norm" in type(m).__name__)
        norms = {parameter for layer in layers for parameter in layer.parameters(recurse=False)}
    if bias_weight_decay is not None:
        biases = {parameter for name, parameter in module.named_parameters() if name.endswith("bias")} - norms
    every = list(module.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in every if p not in norms and p not in biases]},
        {"params": [p for p in every if p in norms], "weight_decay": norm_weight_decay},
        {"params": [p for p in every if p in biases], "weight_decay": bias_weight_decay},
    ]
    return [group for group in groups if group["params"]]
