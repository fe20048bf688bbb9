"""Activations by name."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knlightning.checks import check_choice
from knlightning.nn.composite import Settings

Activation = Literal["relu", "mish", "gelu", "silu"]

_CLASSES: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "mish": nn.Mish, "gelu": nn.GELU, "silu": nn.SiLU}


def make_activation(name: Activation) -> nn.Module:
    """Make an activation that leaves its input as it is, so that hooks may watch the layer before.

    Raises:
        ArgumentError: If there is no activation of that name.
    """
    check_choice("activation", name, get_args(Activation))
    return _CLASSES[name]()


class OtherReLU(nn.ReLU):
    """ReLU that several layers share, of which some have taken it in: with a gradient it leaves their results alone."""

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(input)
        # of a function written in Python this is the context, which compilers cannot see
        settings = None if torch.compiler.is_compiling() else getattr(input.grad_fn, "settings", None)
        return input if isinstance(settings, Settings) and settings.relu_output else F.relu(input)
