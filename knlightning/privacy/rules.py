"""Which layers have exact gradients of single samples, and what a pass of each contributes to them.

Small parameters get the gradient of each sample itself; weights get it in factors, as a
`knlightning.privacy.product.Product`. A new layer is added to `TYPES` and to `parts_of`.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock, LayerNorm2d

from knlightning.nn import KNConv1d, KNConv2d, KNConv3d
from knlightning.nn.functional import Normalization
from knlightning.nn.normalization import NORMS
from knlightning.nn.statistics import statistics_dtype
from knlightning.nn.windows import Window
from knlightning.privacy.product import Product, temporary_bytes

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
KNConv = KNConv1d | KNConv2d | KNConv3d
InstanceNorm = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d

LossReduction = Literal["mean", "sum"]
"""Whether a loss is the mean or the sum over the samples."""

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, KNConv1d, KNConv2d, KNConv3d)
AFFINE = (
    *dict.fromkeys(kind for spec in NORMS.values() if spec.private and spec.affine for kind in spec.types),
    LayerNorm2d,
)
"""Normalizations of each sample by itself that then scale and shift."""
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
        layer: A layer of one of the `TYPES` except the last.
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
        if isinstance(layer, nn.Linear):
            if x.dim() == 2:
                x, grad = x.unsqueeze(-1), grad.unsqueeze(-1)
            else:
                x, grad = (t.flatten(1, -2).transpose(1, 2) for t in (x, grad))
            window, groups = Window.of(1, 1), 1
        elif isinstance(layer, Conv):
            window = Window.of(x.dim() - 2, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            (x, window), groups = window.pad(x, layer.padding_mode), layer.groups
        else:
            assert isinstance(layer, KNConv) and normalization is not None  # noqa: PT018 # one thought
            window, groups = normalization.window, layer.groups
        vectors, products = {}, []
        if bias is not None:
            vectors[bias] = grad.flatten(2).sum(2, dtype=statistics_dtype(grad))
        if weight is not None:
            product = Product(weight, x, grad, window, groups)
            if normalization is not None:
                mean, rstd, relu_input = normalization.mean, normalization.rstd, normalization.relu_input
                product = replace(product, mean=mean, rstd=rstd, relu_input=relu_input)
            products.append(product)
        return vectors, products


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


class _Uncalled(nn.Module):
    """Computes what a layer does, without its hooks."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.forward(x)


def _normalization_without_affine(layer: nn.Module, x: Tensor) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
    """Find how a layer normalizes before it scales and shifts, and over which dimensions its parameters are shared."""
    uncalled = _Uncalled(layer)
    shapes = {name: parameter.shape for name, parameter in uncalled.named_parameters()}

    def normalize(part: Tensor) -> Tensor:
        neutral = {name: part.new_full(shape, name.endswith("weight")) for name, shape in shapes.items()}
        return torch.func.functional_call(uncalled, neutral, part)

    if type(layer) is nn.LayerNorm:  # its parameters have the shape of the last dimensions; those of others are [C]
        return normalize, tuple(range(1, x.dim() - len(layer.normalized_shape)))
    return normalize, tuple(range(2, x.dim()))


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
        elif isinstance(layer, InstanceNorm) and layer.track_running_stats:
            problems.append(f"{kind}: running statistics mix samples. Use track_running_stats=False")
    return problems
