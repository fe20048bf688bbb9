"""What a layer keeps of its convolution's result for backward, until a tensor is found that is kept anyway.

Backward needs the result, or else the output: see `knlightning.nn.autograd.KNConvFunction`. The layer behind keeps that
output, or its ReLU, for itself. So it hands it to the layer in front, which then lets its own tensor go.
"""

from typing import Any

from torch import Tensor

from knlightning.internals.torch import saved_tensors_are_hooked, version_of

_RELUS = ("ReluBackward0", "HardtanhBackward0")
"""Nodes whose gradient is 0 wherever they change their input; the second is that of ReLU6."""


class KeptResult:
    """The result of a convolution, or what has taken its place.

    It is an attribute of the context, since what is saved there cannot be replaced. Hooks on saved tensors, such as
    those of activation checkpointing, do not see attributes: under them nothing is kept, and backward convolves again.

    Args:
        result: The centred result of the convolution.
        output: The output that was made of it.
    """

    def __init__(self, result: Tensor, output: Tensor) -> None:
        self._tensor = None if saved_tensors_are_hooked() else result
        self._version = version_of(output)
        self._changes = output.detach()  # counts the changes of the output in place ...
        self._changes.data = output.new_empty(0)  # ... and does not hold its memory
        self._is_output = False
        self._relu = False
        self._seen: tuple[Tensor, int] | None = None

    def replace(self, tensor: Tensor, relu: Any) -> None:
        """Keep another tensor in place of the result.

        Args:
            tensor: The output or its ReLU, which others keep.
            relu: The node of the ReLU in autograd's graph, or None for the output.
        """
        changes = version_of(self._changes) - self._version
        in_place = changes == 1 and relu is not None and version_of(tensor) == version_of(self._changes)
        if changes and not in_place:
            return  # the output was changed where autograd does not look
        if self._tensor is None or self._is_output:
            return
        self._tensor, self._version = tensor.detach(), version_of(tensor)  # with its node it would keep itself
        self._is_output, self._relu = True, relu is not None
        if relu is not None:
            relu.register_hook(self._watch)

    def _watch(self, gradients: tuple[Tensor | None, ...], _: Any) -> None:
        (gradient,) = gradients
        self._seen = None if gradient is None else (gradient, version_of(gradient))

    def take(self, grad: Tensor) -> tuple[Tensor | None, bool]:
        """Return what is kept, and whether it is the output; None if it does not fit. Then keep nothing.

        The ReLU of the output will do if the gradient is 0 wherever they differ: if it is the gradient of the ReLU, and
        nothing else was made of the output.

        Args:
            grad: The gradient at the output.
        """
        tensor, seen = self._tensor, self._seen
        self._tensor = self._seen = None
        if tensor is not None and self._is_output:
            changed = version_of(tensor) != self._version
            others = self._relu and (seen is None or seen[0] is not grad or seen[1] != version_of(grad))
            tensor = None if changed or others else tensor
        return tensor, self._is_output


def hand_back(input: Tensor) -> None:
    """Hand the input of a layer, which keeps it, to the layer that made it, directly or with a ReLU between them."""
    node, relu = input.grad_fn if type(input) is Tensor else None, None
    if node is not None and node.name() in _RELUS:
        relu, node = node, node.next_functions[0][0]
    kept = getattr(node, "kept", None)
    if isinstance(kept, KeptResult):
        kept.replace(input, relu)
