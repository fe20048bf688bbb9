"""Gradients of single samples, layer by layer, from what a layer was given and the gradient at its output.

A batch's gradient is a sum over its samples. For a linear map of units u (windows of an image, say) at positions l with
the gradient G at the output, the part of sample n is

    dW_n = sum_l G_nl u_nl^T,    |dW_n|^2 = sum_ll' (G_nl . G_nl') (u_nl . u_nl'),    sum_n w_n dW_n = (w G)^T u,

so that its norm, and sums of samples that are weighted after the norms are known, can be had without it. For KNConv the
units are normalized: u = (x - mean) r, with the moments of the very forward pass, dropped out as they were there.
Everything is computed in float32 at least, whatever autocast or TF32 do in the network, so that norms hold to its
precision.

Sources: Goodfellow, Efficient per-example gradient computations (2015); Bu et al., Scalable and efficient training of
large convolutional neural networks with differential privacy (NeurIPS 2022), for choosing between the two ways to a
norm; Bu et al., Differentially private optimization on large model at small cost (ICML 2023), for the weighted sums.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchvision.models.convnext import CNBlock, LayerNorm2d

from knlightning.nn import KNConv1d, KNConv2d, KNConv3d
from knlightning.nn.functional import Normalization
from knlightning.nn.normalization import NORMS
from knlightning.nn.statistics import statistics_dtype
from knlightning.nn.windows import Window
from knlightning.privacy.precision import full_float32

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

_TEMPORARY = {"cpu": 8 * 2**20}
"""Bytes of a temporary, by device."""
_TEMPORARY_ELSEWHERE = 256 * 2**20


@dataclass(frozen=True)
class Product:
    """The gradient of a weight in factors: the units that the layer was given, and the gradient at its output.

    Args:
        weight: filters [O, C / groups, *kernel]; for a linear layer [O, C], of which it is a kernel of one element.
        x: what the layer was given: [N, C, *spatial].
        grad: gradient at the layer's output, before its bias: [N, O, *positions].
        window: the windows of the input; their padding is with zeros.
        groups: blocked connections between channels.
        mean: means that were subtracted from the windows, [N, 1, *positions], or None.
        rstd: factors by which the windows were scaled then, likewise.
        relu_input: whether the layer was given relu(x) in truth.
        views: how many of the samples in a row are views of one, whose gradients are added before a norm is taken.
    """

    weight: nn.Parameter
    x: Tensor
    grad: Tensor
    window: Window
    groups: int
    mean: Tensor | None = None
    rstd: Tensor | None = None
    relu_input: bool = False
    views: int = 1

    def small(self) -> bool:
        """Whether gradients of the samples take hardly more memory than their factors, and no longer to compute."""
        pair = self.x[:1].numel() + self.grad[:1].numel()
        return self.weight.numel() <= 2 * pair and not self._ghost()

    def select(self, kept: Tensor) -> "Product":
        """Restrict to some of the samples, given by a bool tensor [N]."""
        mean, rstd = (None if t is None else t[kept] for t in (self.mean, self.rstd))
        return replace(self, x=self.x[kept], grad=self.grad[kept], mean=mean, rstd=rstd)

    @full_float32()
    def samples(self) -> Tensor:
        """Compute the gradient of each sample; shape [N, *weight.shape]."""
        result = self.x.new_empty((len(self.x), *self.weight.shape), dtype=self._dtype())
        for part in self._slices():
            result[part] = self._samples(part)
        return result

    @full_float32()
    def squared_norms(self) -> Tensor:
        """Compute the squared norm of the gradient of each sample, or what lies above it by rounding; [N / views]."""
        result = self.x.new_zeros(len(self.x) // self.views, dtype=self._dtype())
        for part in self._slices():
            into = slice(part.start // self.views, part.stop // self.views)
            if self._ghost():
                units, grad = (self._views_as_positions(factor) for factor in self._factors(part)[:2])
                products = torch.matmul(grad.transpose(2, 3), grad).mul_(torch.matmul(units.transpose(2, 3), units))
                # a sum of both signs, of which little may be left: no less than it is in truth, for all the rounding
                sizes = products.diagonal(dim1=2, dim2=3).sqrt().sum(2)  # of the gradients at single positions
                terms = self.weight[0].numel() + self.weight.shape[0] + products.shape[-1]
                rounding = torch.finfo(products.dtype).eps * math.sqrt(terms) * sizes.square()
                result[into] = (products.sum((2, 3)) + rounding).clamp_min_(0.0).sum(1)
            else:
                samples = self._samples(part).unflatten(0, (-1, self.views)).sum(1)
                result[into] = torch.linalg.vector_norm(samples.flatten(1), dim=1).square_()
        return result

    @full_float32()
    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Sum the gradients of the samples, each times its weight.

        Args:
            weights: float tensor [N].

        Returns:
            Tensor of the weight's shape.
        """
        dtype = self._dtype()
        spatial = self.x.dim() - 2
        result = torch.zeros_like(self.weight, dtype=dtype, requires_grad=False)
        filters = result.view(*self.weight.shape, *(1,) * (2 + spatial - self.weight.dim()))
        for part in self._slices():
            x, grad = self._input(part), self.grad[part].to(dtype)
            grad = grad * weights[part].to(dtype).view(-1, *(1,) * (1 + spatial))
            if self.rstd is not None and self.mean is not None:
                grad.mul_(self.rstd[part])
                d_sums = torch.matmul(grad.flatten(2), self.mean[part].flatten(2).transpose(1, 2)).sum((0, 2))
                filters.sub_(d_sums.view(-1, *(1,) * (1 + spatial)))
            if spatial == 1 and self._pointwise():
                filters.view(filters.shape[:2]).addmm_(
                    grad.transpose(1, 2).flatten(0, 1).T, x.transpose(1, 2).flatten(0, 1)
                )
                continue
            shape_of = torch.empty_like(filters)  # of which convolution_backward reads nothing but the shape
            _, d_weight, _ = torch.ops.aten.convolution_backward(
                grad, F.pad(x, self.window.pads) if any(self.window.pads) else x, shape_of, None, self.window.stride,
                (0,) * spatial, self.window.dilation, False, (0,) * spatial, self.groups, (False, True, False),
            )  # fmt: skip
            filters.add_(d_weight)
        return result

    def _dtype(self) -> torch.dtype:
        return statistics_dtype(self.x)

    def _pointwise(self) -> bool:
        return self.groups == 1 and self.window == Window.of(self.x.dim() - 2, 1)

    def _positions(self) -> int:
        return math.prod(self.grad.shape[2:])

    def _ghost(self) -> bool:
        """Whether products of positions are fewer than those of the elements of filters and units."""
        filters, elements = self.weight.shape[0] // self.groups, self.weight[0].numel()
        return self._positions() * self.views * (filters + elements) < filters * elements

    def _slices(self) -> Iterator[slice]:
        """Cut the batch so that temporaries are not large."""
        positions, elements = self._positions(), self.groups * self.weight[0].numel()
        values = positions * (elements + self.weight.shape[0])
        values += 2 * self.groups * positions**2 * self.views if self._ghost() else self.weight.numel()
        limit = _TEMPORARY.get(self.x.device.type, _TEMPORARY_ELSEWHERE)
        step = max(1, limit // (values * self._dtype().itemsize * self.views)) * self.views
        for start in range(0, len(self.x), step):
            yield slice(start, start + step)

    def _views_as_positions(self, factor: Tensor) -> Tensor:
        """Reorder [N, groups, elements, positions] to [N / views, groups, elements, views * positions]."""
        return factor.unflatten(0, (-1, self.views)).movedim(1, 3).flatten(3)

    def _input(self, part: slice) -> Tensor:
        x = self.x[part].to(self._dtype())
        return x.relu() if self.relu_input else x

    def _factors(self, part: slice) -> tuple[Tensor, Tensor, bool]:
        """Lay out the units and the gradient for products of matrices.

        Returns:
            units [n, groups, C / groups * elements, positions], grad [n, groups, O / groups, positions], and whether
            the elements of a unit are counted with their channels last.
        """
        kernel, groups = self.window.kernel_size, self.groups
        x, grad = self._input(part), self.grad[part].to(self._dtype())
        n, channels, spatial = len(x), x.shape[1], x.dim() - 2
        channels_last = groups == 1 and x.stride(1) == 1 and channels > 1
        windows = self.window.unfold(x)
        at, inside = range(2, 2 + spatial), range(2 + spatial, 2 + 2 * spatial)
        if channels_last:  # copied in long runs
            units = windows.permute(0, *at, *inside, 1).reshape(n, 1, self._positions(), -1).transpose(2, 3)
        else:
            units = windows.permute(0, 1, *inside, *at)
            units = units.reshape(n, groups, channels // groups * math.prod(kernel), self._positions())
        if self.mean is not None and self.rstd is not None:
            units = units - self.mean[part].reshape(n, 1, 1, -1)
            grad = grad * self.rstd[part]
        grad = grad.flatten(2)
        return units, grad.unflatten(1, (groups, -1)), channels_last

    def _samples(self, part: slice) -> Tensor:
        units, grad, channels_last = self._factors(part)
        result = torch.matmul(grad, units.transpose(2, 3)).flatten(1, 2)  # [n, O, elements]
        if channels_last:
            return result.unflatten(2, (*self.window.kernel_size, -1)).movedim(-1, 2).reshape(-1, *self.weight.shape)
        return result.view(-1, *self.weight.shape)


Parts = tuple[dict[nn.Parameter, Tensor], list[Product]]
"""Gradients of the samples of small parameters, [N, *shape], and those of weights in factors."""


def parts_of(
    layer: nn.Module,
    x: Tensor,
    grad: Tensor,
    normalization: Normalization | None,
    wanted: Iterable[nn.Parameter],
) -> Parts:
    """Find what a pass of a layer contributes to the gradients of its parameters, sample by sample.

    Args:
        layer: a layer of one of the :data:`TYPES` but the last.
        x: what it was given: [N, ...].
        grad: gradient at what it returned, or, of a KNConv that applies a ReLU to that, before this.
        normalization: for a KNConv, how it normalized.
        wanted: the parameters that are trained.
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
    """Sum what scale and shift get over positions, for a few samples at a time."""
    normalize, positions = _normalization_without_affine(layer, x)
    dtype = statistics_dtype(x)
    shape = [size for dim, size in enumerate(x.shape) if dim not in positions]
    result = {p: x.new_empty(shape, dtype=dtype) for p in (weight, bias) if p is not None}
    limit = _TEMPORARY.get(x.device.type, _TEMPORARY_ELSEWHERE)
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
    """Name the layers of a network whose gradients of single samples could not be told exactly.

    Opacus would take a general way for layers without a rule, which draws its random numbers anew.

    Args:
        model: the network, with its trainable parameters as they are to be trained.

    Returns:
        A sentence for each module that has trainable parameters of its own and no exact rule, with the way out; none
        if all is well.
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


class LayerScale:
    """Compute the gradients of the samples at the scale of a ConvNeXt block in each backward pass.

    The scale is a parameter of the block itself, between its layers and a stochastic depth, whose draws are seen in the
    gradient that comes from there.

    Args:
        block: the block.
        give: is called in backward with the block and the gradients [N, *layer_scale.shape].
    """

    def __init__(self, block: CNBlock, give: Callable[[CNBlock, Tensor], None]) -> None:
        self.block, self.give = block, give
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
        self.give(self.block, samples[..., None, None])
