"""Gradients of single samples at the scale of the blocks of ConvNeXt."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchvision.models.convnext import CNBlock

from knlightning.nn.statistics import statistics_dtype


class LayerScale:
    """Compute the gradients of the samples at the scale of a ConvNeXt block in each backward pass.

    The scale is a parameter of the block itself, between its layers and a stochastic depth. The gradient that comes
    from there is 0 for samples whose block was skipped.

    Args:
        block: The block.
        receive: Is called in backward with the block and the gradients [N, *layer_scale.shape].
    """

    def __init__(self, block: CNBlock, receive: Callable[[CNBlock, Tensor], None]) -> None:
        self.block, self.receive = block, receive
        self.unscaled: list[Tensor] = []

    def watch(self) -> list[RemovableHandle]:
        """Begin; return handles by which to end it."""
        return [
            self.block.block.register_forward_hook(self._keep),
            self.block.stochastic_depth.register_forward_pre_hook(self._follow),
        ]

    def _keep(self, layers: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.unscaled = [output.detach()]

    def _follow(self, depth: nn.Module, args: tuple[Tensor, ...]) -> None:
        unscaled, self.unscaled = self.unscaled, []
        if args[0].requires_grad:
            args[0].register_hook(partial(self._gradients, unscaled))

    def _gradients(self, unscaled: list[Tensor], grad: Tensor) -> None:
        x = unscaled.pop()  # the graph may live on
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            samples = (x.to(statistics_dtype(x)) * grad).sum((2, 3))
        self.receive(self.block, samples[..., None, None])
