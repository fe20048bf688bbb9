"""What the package uses of Opacus that is not public."""

from typing import Any

from torch import nn

# ---- private training


def passes_awaiting_gradients(layer: nn.Module) -> int:
    """Count the forward passes of a layer whose backward pass Opacus' hooks still await. Tried with opacus 1.6.0.

    A rule is called after Opacus has taken its own pass from the list.
    """
    awaiting: Any = layer.activations
    return len(awaiting)
