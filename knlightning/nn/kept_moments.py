"""What a kernel normalized convolution keeps for its backward pass, for exact gradients of single samples."""

from typing import NamedTuple

from torch import Tensor

from knlightning.nn.composite import Settings
from knlightning.nn.windows import Window


class Normalization(NamedTuple):
    """What a call of `knlightning.nn.kn_conv` convolved, and how it normalized it.

    Attributes:
        input: The input of the convolution, before `relu_input` and after a padding that is not with zeros:
            [N, C, *spatial], detached.
        mean: Means of the windows after dropout: [N, 1, *positions], float32 or float64.
        rstd: 1 / sqrt(var + eps) of the windows, of the same shape.
        window: The windows of that input; their padding is with zeros.
        relu_input: As in `knlightning.nn.kn_conv`.
        relu_output: As in `knlightning.nn.kn_conv`.
    """

    input: Tensor
    mean: Tensor
    rstd: Tensor
    window: Window
    relu_input: bool
    relu_output: bool


def normalization_of(output: Tensor) -> Normalization:
    """Look up what a call of `knlightning.nn.kn_conv` keeps for its backward pass, without computing or copying.

    Args:
        output: The tensor that it returned, not a view of it, before its backward pass.

    Raises:
        ValueError: If the tensor is not the result of such a call, or no gradient of it is wanted.
    """
    node = output.grad_fn  # for a function written in Python this is the context of its forward pass
    settings = getattr(node, "settings", None)
    if node is None or not isinstance(settings, Settings):
        raise ValueError(
            "output must be the result of an eager kernel normalized convolution whose gradient is wanted, got a "
            f"tensor made by {'no operation' if node is None else node.name()}"
        )
    input, mean, rstd, *_ = node.saved_tensors  # type: ignore[attr-defined] # a context has them, these first
    return Normalization(input.detach(), mean, rstd, settings.window, settings.relu_input, settings.relu_output)
