"""Which layers have exact gradients of single samples, and what a pass of each contributes to them.

Small parameters get the gradient of each sample itself; weights get it in factors, as a
:class:`knlightning.privacy.product.Product`. A new layer is added to :data:`TYPES` and to :func:`parts_of`.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock, LayerNorm2d

from knlightning.nn import (
    KNConv1d,
    KNConv2d,
    KNConv3d,
    LocalContextNorm2d,
    PositionalNorm2d,
    local_context_norm,
    positional_norm,
)
from knlightning.nn.functional import Normalization
from knlightning.nn.geometry import padding_pairs
from knlightning.nn.statistics import statistics_dtype
from knlightning.privacy.product import Product, temporary_bytes

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
KNConv = KNConv1d | KNConv2d | KNConv3d
InstanceNorm = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d

LossReduction = Literal["mean", "sum"]
"""Whether a loss is the mean or the sum over the samples."""

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, KNConv1d, KNConv2d, KNConv3d)
AFFINE = (
    *(nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(LocalContextNorm2d, PositionalNorm2d, LayerNorm2d),
)
TYPES: tuple[type[nn.Module], ...] = (*LINEAR, *AFFINE, CNBlock)
"""The layers with exact rules; subclasses may compute anything, and have none."""

Parts = tuple[dict[nn.Parameter, Tensor], list[Product]]
"""Gradients of the samples at small parameters, [N, *shape], and those at weights in factors."""


def parts_of(
    layer: nn.Module,
    x: Tensor,
    grad: Tensor,
    normalization: Normalization | None,
    wanted: Iterable[nn.Parameter],
) -> Parts:
    """Find what a pass of a layer contributes to the gradients of its parameters, sample by sample.

    Args:
        layer: A layer of one of the :data:`TYPES` except the last.
        x: What it was given: [N, ...].
        grad: Gradient at what it returned; for a KNConv that applies a ReLU to its output, before this ReLU.
        normalization: For a KNConv, how it normalized.
        wanted: The parameters that are trained.

    Returns:
        The gradients of the samples at small parameters, and the products for weights.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        weight, bias = (_among(wanted, p) for p in (layer.weight, layer.bias))
        if isinstance(layer, AFFINE):
            return _affine_parts(layer, x, grad, weight, bias), []
        geometry: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
        if isinstance(layer, nn.Linear):
            if x.dim() == 2:
                x, grad = x.unsqueeze(-1), grad.unsqueeze(-1)
            else:
                x, grad = (t.flatten(1, -2).transpose(1, 2) for t in (x, grad))
            geometry = (1,), (0, 0), (1,), 1
        elif isinstance(layer, Conv):
            geometry = layer.stride, _pads(layer), layer.dilation, layer.groups
        else:
            assert isinstance(layer, KNConv) and normalization is not None  # noqa: PT018 # one thought
            geometry = layer.stride, normalization.pads, (1,) * layer.spatial, layer.groups
        vectors, products = {}, []
        if bias is not None:
            vectors[bias] = grad.flatten(2).sum(2, dtype=statistics_dtype(grad))
        if weight is not None:
            product = Product(weight, x, grad, *geometry)
            if normalization is not None:
                mean, rstd, relu_input = normalization.mean, normalization.rstd, normalization.relu_input
                product = replace(product, mean=mean, rstd=rstd, relu_input=relu_input)
            products.append(product)
        return vectors, products


def _pads(layer: Conv) -> tuple[int, ...]:
    if isinstance(layer.padding, str):
        spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        around = [span if layer.padding == "same" else 0 for span in reversed(spans)]
        return tuple(p for total in around for p in (total // 2, total - total // 2))
    return padding_pairs(layer.padding, len(layer.kernel_size))


def _among(wanted: Iterable[nn.Parameter], parameter: Any) -> nn.Parameter | None:
    return next((one for one in wanted if one is parameter), None)  # `in` would compare their values


def _affine_parts(
    layer: nn.Module, x: Tensor, grad: Tensor, weight: nn.Parameter | None, bias: nn.Parameter | None
) -> dict[nn.Parameter, Tensor]:
    """Sum the gradients of scale and shift over positions, for a few samples at a time."""
    normalize, positions = _normalization_without_affine(layer, x)
    dtype = statistics_dtype(x)
    shape = [size for dim, size in enumerate(x.shape) if dim not in positions]
    result = {p: x.new_empty(shape, dtype=dtype) for p in (weight, bias) if p is not None}
    limit = temporary_bytes(x.device)
    step = max(1, limit // max(x[:1].numel() * dtype.itemsize, 1))
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        gradient = grad[part].to(dtype)
        if weight is not None:
            scaled = normalize(x[part].to(dtype)).mul_(gradient)
            result[weight][part] = scaled.sum(positions) if positions else scaled
        if bias is not None:
            result[bias][part] = gradient.sum(positions) if positions else gradient
    return result


def _normalization_without_affine(layer: nn.Module, x: Tensor) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
    """Find how a layer normalizes before it scales and shifts, and over which dimensions its parameters are shared."""
    behind_channels = tuple(range(2, x.dim()))
    match layer:
        case LocalContextNorm2d():
            normalize = partial(local_context_norm, groups=layer.num_groups, window=layer.window, eps=layer.eps)
            return normalize, behind_channels
        case PositionalNorm2d() | LayerNorm2d():
            return partial(positional_norm, eps=layer.eps), behind_channels
        case nn.LayerNorm():
            normalize = partial(F.layer_norm, normalized_shape=layer.normalized_shape, eps=layer.eps)
            return normalize, tuple(range(1, x.dim() - len(layer.normalized_shape)))
        case nn.GroupNorm():
            return partial(F.group_norm, num_groups=layer.num_groups, eps=layer.eps), behind_channels
        case _:
            assert isinstance(layer, InstanceNorm)
            return partial(F.instance_norm, eps=layer.eps), behind_channels


def check_rules(model: nn.Module) -> list[str]:
    """Name the layers of a network for which there is no exact rule for the gradients of single samples.

    For layers without a rule Opacus runs each sample again, with new random numbers.

    Args:
        model: The network, with its trainable parameters as they are to be trained.

    Returns:
        A sentence for each module that has trainable parameters of its own and no exact rule, with what to do; none if
        every module has one.
    """
    problems = []
    for name, layer in model.named_modules():
        if not any(p.requires_grad for p in layer.parameters(recurse=False)):
            continue
        kind = f"{name or 'the network'} ({type(layer).__name__})"
        if type(layer) not in TYPES:
            problems.append(
                f"{kind}: there is no rule for the gradients of single samples of this type of layer. Freeze its "
                f"parameters, or use one of {', '.join(sorted(t.__name__ for t in TYPES))}"
            )
        elif isinstance(layer, Conv) and layer.padding_mode != "zeros":
            problems.append(f'{kind}: there is no rule for padding_mode="{layer.padding_mode}". Use "zeros"')
        elif isinstance(layer, InstanceNorm) and layer.track_running_stats:
            problems.append(f"{kind}: running statistics mix samples. Use track_running_stats=False")
    return problems
