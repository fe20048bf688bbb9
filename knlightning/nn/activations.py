"""Activations by name."""

from typing import Literal, get_args

from torch import nn

from knlightning.checks import check_choice

Activation = Literal["relu", "mish", "gelu", "silu"]

_CLASSES: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "mish": nn.Mish, "gelu": nn.GELU, "silu": nn.SiLU}


def make_activation(name: Activation) -> nn.Module:
    """Make an activation that leaves its input as it is, so that hooks may watch the layer before.

    Raises:
        ArgumentError: If there is no activation of that name.
    """
    check_choice("activation", name, get_args(Activation))
    return _CLASSES[name]()
