"""Activations by name."""

from typing import Literal, get_args

from torch import nn

Activation = Literal["relu", "mish", "gelu", "silu"]

_CLASSES: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "mish": nn.Mish, "gelu": nn.GELU, "silu": nn.SiLU}


def make_activation(name: Activation) -> nn.Module:
    """Make an activation that leaves its input as it is, so that hooks may watch the layer before.

    Raises:
        ValueError: if there is no activation of that name.
    """
    if name not in _CLASSES:
        raise ValueError(f"activation must be one of {', '.join(get_args(Activation))}, got {name!r}")
    return _CLASSES[name]()
