"""The gradients of the samples at a weight, as products of two factors that a pass leaves behind.

For a linear map of units u (windows of an image, say) at positions l with the gradient G at the output, the part of
sample n in the gradient of the batch is

    dW_n = sum_l G_nl u_nl^T,    |dW_n|^2 = sum_ll' (G_nl . G_nl') (u_nl . u_nl'),    sum_n w_n dW_n = (w G)^T u,

so that its norm, and sums of samples that are weighted after the norms are known, can be computed without it. For
KNConv the units are normalized: u = (x - mean) r, with the moments of the very forward pass, and the dropout of it.
Everything is computed in float32 at least, whatever autocast or TF32 do in the network, so that norms hold to its
precision.

Sources: Goodfellow, Efficient per-example gradient computations (2015); Bu et al., Scalable and efficient training of
large convolutional neural networks with differential privacy (NeurIPS 2022), for choosing between the two ways to a
norm; Bu et al., Differentially private optimization on large model at small cost (ICML 2023), for the weighted sums.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from knlightning.nn.statistics import statistics_dtype
from knlightning.nn.windows import Window
from knlightning.privacy.precision import full_float32

TEMPORARY_BYTES = {"cpu": 8 * 2**20}
"""Size of a temporary tensor, by device."""
TEMPORARY_BYTES_ELSEWHERE = 256 * 2**20
"""The same for devices that are not listed."""


def temporary_bytes(device: torch.device) -> int:
    """Return how large a temporary tensor may become on a device."""
    return TEMPORARY_BYTES.get(device.type, TEMPORARY_BYTES_ELSEWHERE)


@dataclass(frozen=True)
class Product:
    """The gradient of a weight in factors: the units that the layer was given, and the gradient at its output.

    Args:
        weight: Filters [O, C / groups, *kernel]; for a linear layer [O, C], of which it is a kernel of one element.
        x: What the layer was given: [N, C, *spatial].
        grad: Gradient at the layer's output, before its bias: [N, O, *positions].
        window: The windows of the input; their padding is with zeros.
        groups: Blocked connections between channels.
        mean: Means that were subtracted from the windows, [N, 1, *positions], or None.
        rstd: Factors by which the windows were scaled then, likewise.
        relu_input: Whether the layer was given relu(x).
        views: How many of the samples in a row are views of one, whose gradients are added before a norm is taken.
    """

    weight: Tensor
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
        """Compute the squared norm of the gradient of each sample, at most too large by rounding; [N / views]."""
        result = self.x.new_zeros(len(self.x) // self.views, dtype=self._dtype())
        for part in self._slices():
            into = slice(part.start // self.views, part.stop // self.views)
            if self._ghost():
                units, grad = (self._views_as_positions(factor) for factor in self._factors(part)[:2])
                products = torch.matmul(grad.transpose(2, 3), grad).mul_(torch.matmul(units.transpose(2, 3), units))
                # terms of both signs may cancel, and rounding is then most of their sum: allow for it, upwards
                sizes = products.diagonal(dim1=2, dim2=3).sqrt().sum(2)  # of the gradients at single positions
                terms = self.weight[0].numel() + self.weight.shape[0] + products.shape[-1]
                rounding = torch.finfo(products.dtype).eps * math.sqrt(terms) * sizes.square()
                result[into] = (products.sum((2, 3)) + rounding).clamp_min_(0.0).sum(1)
            else:
                samples = self._samples(part).unflatten(0, (-1, self.views)).sum(1)
                result[into] = torch.linalg.vector_norm(samples.flatten(1), dim=1).square_()
            result[into] = (result[into].sqrt() + self._rounding_of_sums(part)).square_()
        return result

    @full_float32()
    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Sum the gradients of the samples, each times its weight.

        Args:
            weights: Float tensor [N].

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
            x = F.pad(x, self.window.pads) if any(self.window.pads) else x
            if self.rstd is not None and self.mean is not None:
                grad.mul_(self.rstd[part])
                # around the centre of the sample: a large constant would be most of both terms, and of their rounding
                centre = self._centre(part)
                x, mean = x - centre, self.mean[part] - centre
                d_sums = torch.matmul(grad.flatten(2), mean.flatten(2).transpose(1, 2)).sum((0, 2))
                filters.sub_(d_sums.view(-1, *(1,) * (1 + spatial)))
            if spatial == 1 and self._pointwise():
                filters.view(filters.shape[:2]).addmm_(
                    grad.transpose(1, 2).flatten(0, 1).T, x.transpose(1, 2).flatten(0, 1)
                )
                continue
            shape_of = torch.empty_like(filters)  # convolution_backward reads its shape only
            _, d_weight, _ = torch.ops.aten.convolution_backward(
                grad, x, shape_of, None, self.window.stride, (0,) * spatial, self.window.dilation,
                False, (0,) * spatial, self.groups, (False, True, False),
            )  # fmt: skip
            filters.add_(d_weight)
        return result

    def _centre(self, part: slice) -> Tensor:
        """Return the mean of the means of a sample's windows; [n, 1, ...]."""
        assert self.mean is not None
        return self.mean[part].to(self._dtype()).flatten(1).mean(1).view(-1, *(1,) * (self.x.dim() - 1))

    def _rounding_of_sums(self, part: slice) -> Tensor:
        """Bound the rounding of `weighted_sum`, which adds up other terms than the norms do; [n / views].

        The terms of the positions may cancel, and are then larger than their sum. What is returned is their size times
        the precision: it is added to the norms, so that the parts of samples in a sum are not larger than these.
        """
        grad, dtype = self.grad[part].to(self._dtype()).flatten(2), self._dtype()
        if self.mean is not None and self.rstd is not None:
            # |u - c|^2 = elements * (variance + (mean - c)^2), and r^2 * variance is at most 1
            off = (self.mean[part] - self._centre(part)).to(dtype) * self.rstd[part]
            sizes = (1.0 + off.flatten(2).square()).sqrt() * math.sqrt(self.weight[0].numel())
            terms = (torch.linalg.vector_norm(grad, dim=1) * sizes.squeeze(1)).sum(1)
        else:
            # by Cauchy and Schwarz; each pixel is in as many windows as a window has pixels, at most
            x = self._input(part).flatten(1)
            terms = torch.linalg.vector_norm(grad.flatten(1), dim=1) * torch.linalg.vector_norm(x, dim=1)
            terms = terms * math.sqrt(math.prod(self.window.kernel_size))
        # errors add up over the positions
        return torch.finfo(dtype).eps * math.sqrt(self._positions()) * terms.unflatten(0, (-1, self.views)).sum(1)

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
        limit = temporary_bytes(self.x.device)
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
            The units [n, groups, C / groups * elements, positions], the gradient [n, groups, O / groups, positions],
            and whether the elements of a unit are counted with their channels last.
        """
        kernel, groups = self.window.kernel_size, self.groups
        x, grad = self._input(part), self.grad[part].to(self._dtype())
        n, channels, spatial = len(x), x.shape[1], x.dim() - 2
        channels_last = groups == 1 and x.stride(1) == 1 and channels > 1
        windows = self.window.unfold(x)
        at, within = range(2, 2 + spatial), range(2 + spatial, 2 + 2 * spatial)
        if channels_last:  # copied in long runs
            units = windows.permute(0, *at, *within, 1).reshape(n, 1, self._positions(), -1).transpose(2, 3)
        else:
            units = windows.permute(0, 1, *within, *at)
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
