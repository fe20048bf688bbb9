"""Converted networks that begin as near to the original as least squares bring them."""

import copy
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from knlightning.models.flow import Flow, of_last_dimension
from knlightning.models.weights import last_layer
from knlightning.nn import KNConv1d, KNConv2d, KNConv3d, kernel_norm
from knlightning.nn.normalization import NORM_TYPES

BATCHES = 8
"""Number of batches that are enough."""
POSITIONS = 1024
"""Largest number of windows that are taken from an image."""
RIDGE = 1e-3
"""Added to the diagonal of the equations, relative to its mean."""
KNConv = KNConv1d | KNConv2d | KNConv3d
Images = tuple[Tensor, ...]


@torch.no_grad()
def calibrate(original: nn.Module, converted: nn.Module, batches: Iterable[Any]) -> None:
    """Fit the layers of a converted network to a pretrained original, one after the other.

    The filters and the bias of each KNConv, and the last linear layer, become those with which its output is nearest to
    that of the original, in the mean square over windows of a few batches: of the convolution and the normalization
    behind it, or of the convolution alone if its normalization stood in front. Its inputs are those that the layers
    fitted before give it, so that their errors are made up for. Transposed convolutions, those with statistics of
    their own groups or with standardized filters, and layers that evaluation does not call are left.

    Args:
        original: The network that was converted; it is not changed.
        converted: What `knlightning.models.kernel_normalize` has made of it; it is changed in place.
        batches: Batches of images as for evaluation, alone or first in a list or tuple; eight are taken.

    Raises:
        ValueError: If there is no batch.
    """
    device = next(converted.parameters()).device
    images = [(batch[0] if isinstance(batch, list | tuple) else batch).to(device) for batch in islice(batches, BATCHES)]
    if not images:
        raise ValueError("calibrate: there is no batch of images")
    modes = {module: module.training for module in converted.modules()}
    original, flow = copy.deepcopy(original).eval(), Flow(original)
    converted.eval()
    targets: dict[str, str] = {}
    for norm in flow.norms():
        before = flow.before(norm)
        if isinstance(before, set) and not isinstance(converted.get_submodule(norm), NORM_TYPES):
            targets |= dict.fromkeys(before - targets.keys(), norm)
    names = [name for name in flow.calls if type(converted.get_submodule(name)) in (KNConv1d, KNConv2d, KNConv3d)]
    names += [name for name, layer in converted.named_modules() if layer is last_layer(converted)]
    for name in names:
        layer, target = converted.get_submodule(name), original.get_submodule(targets.get(name, name))
        if isinstance(layer, KNConv | nn.Linear):
            _fit(layer, ((_caught(converted, layer, x), _output(original, target, x)) for x in images))
    for module, training in modes.items():
        module.training = training


def _fit(layer: KNConv | nn.Linear, pairs: Iterable[tuple[Images, Images]]) -> None:
    """Solve the normal equations for the weight and the bias of a layer, in each of its groups.

    Args:
        layer: The layer.
        pairs: What it gets of the images of a batch, one by one, and what it shall give, with the channels last.
    """
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    squares: Any = 0
    products: Any = 0
    for inputs, outputs in pairs:
        for x, y in zip(inputs, outputs, strict=True):
            rows, wanted = _windows(layer, x), y.flatten(0, -2)
            step = -(-len(rows) // POSITIONS)
            rows, wanted = rows[::step].double(), wanted[::step].double()
            rows = rows.unflatten(1, (groups, -1)).movedim(1, 0)
            rows = torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)
            squares = squares + rows.mT @ rows
            products = products + rows.mT @ wanted.unflatten(1, (groups, -1)).movedim(1, 0)
    if isinstance(squares, int):
        return  # it is not called
    diagonal = squares.diagonal(dim1=-2, dim2=-1)
    diagonal += RIDGE * diagonal.mean(dim=-1, keepdim=True)
    solved = torch.linalg.solve(squares, products).mT.flatten(0, 1)
    layer.weight.copy_(solved[:, :-1].reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(solved[:, -1])


def _windows(layer: KNConv | nn.Linear, x: Tensor) -> Tensor:
    """Lay out what the weight of a layer is multiplied with, a row for each window."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)
    windows = kernel_norm(
        x,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dropout_p,
        training=False,
        eval_statistics=layer.eval_statistics,
        eps=layer.eps,
        dilation=layer.dilation,
        padding_mode=layer.padding_mode,
    )
    for place, size in reversed(list(enumerate(layer.kernel_size, 2))):
        windows = windows.unflatten(place, (-1, size))
    positions = range(2, windows.dim(), 2)
    return windows.permute(0, *positions, 1, *range(3, windows.dim(), 2)).flatten(0, len(positions)).flatten(1)


def _output(network: nn.Module, layer: nn.Module, images: Tensor) -> Images:
    """Return what a layer of a network gives, with channels last; with an activation in it, what comes before that."""
    inner = next(layer.children(), None)
    outputs = _caught(network, layer if inner is None else inner, images, after=inner is None)
    last = isinstance(layer, nn.Linear) or of_last_dimension(layer)
    return outputs if last else tuple(output.movedim(1, -1) for output in outputs)


class _CaughtError(Exception):
    """The forward pass is not needed further."""


def _caught(network: nn.Module, layer: nn.Module, images: Tensor, after: bool = False) -> Images:
    """Return what a layer of a network gets, or what it gives, for each image; nothing if it is not called."""
    found: list[Tensor] = []

    def catch(module: nn.Module, inputs: Any, output: Any = None) -> None:
        found.append(output if after else inputs[0])
        raise _CaughtError

    handle = layer.register_forward_hook(catch) if after else layer.register_forward_pre_hook(catch)
    try:
        network(images)
    except _CaughtError:
        return found[0].split(1)
    finally:
        handle.remove()
    return ()
