"""Which layers have exact gradients of single samples, and what a pass of each contributes to them.

Small parameters get the gradient of each sample itself; weights get it in factors, as a
`knlightning.privacy.product.Product`. A new layer is added to `TYPES` and to `parts_of`, or what it calls to
`knlightning.privacy.function_rules`.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

from knlightning.nn import (
    GroupKNConv1d,
    GroupKNConv2d,
    GroupKNConv3d,
    KNConv1d,
    KNConv2d,
    KNConv3d,
    KNConvTranspose1d,
    KNConvTranspose2d,
    KNConvTranspose3d,
    StandardizedKNConv2d,
)
from knlightning.nn.functional import Normalization
from knlightning.nn.normalization import NORMS
from knlightning.nn.statistics import statistics_dtype
from knlightning.nn.windows import Window
from knlightning.privacy.embedding import Embedded
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
TYPES: tuple[type[nn.Module], ...] = (*LINEAR, *AFFINE)
"""The layers whose calls are watched as a whole; subclasses may compute anything, and are none of them."""
BY_FUNCTION: tuple[type[nn.Module], ...] = (
    nn.MultiheadAttention,
    nn.Embedding,
    nn.RMSNorm,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.PReLU,
    GroupKNConv1d,
    GroupKNConv2d,
    GroupKNConv3d,
    KNConvTranspose1d,
    KNConvTranspose2d,
    KNConvTranspose3d,
    StandardizedKNConv2d,
)
"""Layers that call functions of `knlightning.privacy.function_rules`, as may layers of other packages."""

COMPOSITES = {
    "torch.nn.modules.activation.MultiheadAttention",
    "torchvision.models.swin_transformer.ShiftedWindowAttention",
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2",
    "timm.models.beit.Attention",
    "timm.models.eva.EvaAttention",
    "timm.models.maxxvit.Attention2d",
    "timm.models.maxxvit.AttentionCl",
    "timm.models.swin_transformer_v2.WindowAttention",
    "timm.models.xcit.PositionalEncodingFourier",
}
"""Modules that give parameters of their parts to functions, or call their parts for what is no sample."""
WINDOWED = {
    "torchvision.models.swin_transformer.ShiftedWindowAttention",
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2",
    "timm.models.maxxvit.ParallelPartitionAttention",
    "timm.models.maxxvit.PartitionAttentionCl",
    "timm.models.mobilevit.MobileVitBlock",
    "timm.models.swin_transformer.SwinTransformerBlock",
    "timm.models.swin_transformer_v2.SwinTransformerV2Block",
}
"""Modules that cut each sample into windows, which lie behind each other in the first dimension."""

Factors = Product | Embedded
Parts = tuple[dict[Any, Tensor], list[Any]]
"""Gradients of the samples at small parameters, [N, *shape], and those at weights in `Factors`."""
Rule = Callable[[Tensor, Tensor], Parts]
"""Makes gradients of samples of what a layer or a function was given, and the gradient at what it returned."""


def parts_of(
    layer: nn.Module,
    x: Tensor,
    grad: Tensor,
    normalization: Normalization | None,
    wanted: Iterable[nn.Parameter],
) -> Parts:
    """Find what a pass of a layer contributes to the gradients of its parameters, sample by sample.

    Args:
        layer: A layer of one of the `TYPES`.
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
            return affine_parts(*_normalization_without_affine(layer, x), x, grad, weight, bias), []
        if isinstance(layer, nn.Linear):
            return linear_parts(x, grad, weight, bias)
        if isinstance(layer, Conv):
            window = Window.of(x.dim() - 2, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            x, window = window.pad(x, layer.padding_mode)
            return conv_parts(x, grad, weight, bias, window, layer.groups)
        assert isinstance(layer, KNConv) and normalization is not None  # noqa: PT018 # one thought
        vectors, products = conv_parts(x, grad, weight, bias, normalization.window, layer.groups)
        mean, rstd, relu_input = normalization.mean, normalization.rstd, normalization.relu_input
        return vectors, [replace(each, mean=mean, rstd=rstd, relu_input=relu_input) for each in products]


def linear_parts(x: Tensor, grad: Tensor, weight: Tensor | None, bias: Tensor | None) -> Parts:
    """Find what a linear map of the last dimension contributes; None for parameters that are not trained."""
    if x.dim() == 2:
        x, grad = x.unsqueeze(-1), grad.unsqueeze(-1)
    else:
        x, grad = (t.flatten(1, -2).transpose(1, 2) for t in (x, grad))
    return conv_parts(x, grad, weight, bias, Window.of(1, 1), 1)


def conv_parts(
    x: Tensor, grad: Tensor, weight: Tensor | None, bias: Tensor | None, window: Window, groups: int
) -> Parts:
    """Find what a convolution contributes; None for parameters that are not trained."""
    vectors = {} if bias is None else {bias: grad.flatten(2).sum(2, dtype=statistics_dtype(grad))}
    return vectors, [] if weight is None else [Product(weight, x, grad, window, groups)]


def _among(wanted: Iterable[nn.Parameter], parameter: Any) -> nn.Parameter | None:
    return next((one for one in wanted if one is parameter), None)  # `in` would compare their values


def affine_parts(
    normalize: Callable[[Tensor], Tensor],
    positions: tuple[int, ...],
    x: Tensor,
    grad: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> dict[Tensor, Tensor]:
    """Sum the gradients of scale and shift over positions, for a few samples at a time.

    Args:
        normalize: What was done before scale and shift.
        positions: Dimensions over which these are shared.
        x: What was normalized.
        grad: Gradient at the output.
        weight: The scale, or None if it is not trained.
        bias: The shift, likewise.
    """
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


def kind_of(layer: nn.Module) -> str:
    """Return the full name of the type of a layer, which tells of packages that may not be installed."""
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def check_rules(model: nn.Module) -> list[str]:
    """Name the layers of a network for which there is no exact rule for the gradients of single samples.

    Modules of other packages are not among them: what their functions do with a parameter is found out in the forward
    pass, and refused there if there is no rule.

    Args:
        model: The network, with its trainable parameters as they are to be trained.

    Returns:
        A sentence for each layer of torch and of this package that has trainable parameters of its own and no exact
        rule, with what to do; none if every layer has one.
    """
    problems = []
    known = (*TYPES, *BY_FUNCTION)
    for name, layer in model.named_modules():
        if not any(p.requires_grad for p in layer.parameters(recurse=False)):
            continue
        kind = f"{name or 'the network'} ({type(layer).__name__})"
        watched = type(layer).__module__.startswith(("torch.nn.", "knlightning.nn."))
        if watched and type(layer) not in known and not isinstance(layer, nn.Linear):  # of an attention
            problems.append(
                f"{kind}: there is no rule for the gradients of single samples of this type of layer. Freeze its "
                f"parameters, or use one of {', '.join(sorted(t.__name__ for t in known))}"
            )
        elif isinstance(layer, InstanceNorm) and layer.track_running_stats:
            problems.append(f"{kind}: running statistics mix samples. Use track_running_stats=False")
        elif isinstance(layer, nn.Embedding) and (layer.max_norm or layer.scale_grad_by_freq or layer.sparse):
            problems.append(
                f"{kind}: it changes its rows, or their gradients, by all samples of a batch. Leave out max_norm, "
                "scale_grad_by_freq and sparse"
            )
        elif isinstance(layer, nn.MultiheadAttention) and (layer.bias_k is not None or layer.add_zero_attn):
            problems.append(f"{kind}: there is no rule for keys that it adds. Leave out add_bias_kv and add_zero_attn")
    return problems
