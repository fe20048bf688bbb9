"""Settings of optimizers and networks: with which of them nothing can be learned, though torch takes them."""

import torch
from torch import nn
from torch.optim import Optimizer

from knlightning.checks import check, check_number

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
