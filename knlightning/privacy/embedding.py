"""The gradients of the samples at a table of which each sample takes some rows."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from knlightning.nn.statistics import statistics_dtype


@dataclass(frozen=True)
class Embedded:
    """The gradient of a table in factors, as `knlightning.privacy.product.Product` is that of a weight.

    Where a sample takes a row several times, its gradients there are added before a norm is taken.

    Args:
        weight: The table [rows, channels].
        x: Which rows each sample took: [N, *positions].
        grad: Gradient at what they are: [N, *positions, channels].
        views: How many of the samples in a row are views of one.
    """

    weight: Tensor
    x: Tensor
    grad: Tensor
    views: int = 1

    def small(self) -> bool:
        """Whether gradients of the samples take hardly more memory than their factors."""
        return self.weight.numel() <= 2 * self.grad[:1].numel()

    def select(self, kept: Tensor) -> "Embedded":
        """Restrict to some of the samples, given by a bool tensor [N]."""
        return replace(self, x=self.x[kept], grad=self.grad[kept])

    def samples(self) -> Tensor:
        """Compute the gradient of each sample; shape [N, *weight.shape]."""
        grad = self._grad()
        result = grad.new_zeros(len(grad), *self.weight.shape)
        return result.scatter_add_(1, self.x.flatten(1)[..., None].expand_as(grad), grad)

    def squared_norms(self) -> Tensor:
        """Compute the squared norm of the gradient of each sample; [N / views]."""
        rows, grad = (each.flatten(0, 1).unflatten(0, (-1, self.views * each.shape[1])) for each in self._factors())
        rows, order = rows.sort(1)
        grad = grad.gather(1, order[..., None].expand_as(grad))
        # places of one row lie behind each other now, and are added at the place of the first
        first = torch.ones_like(rows, dtype=torch.bool)
        first[:, 1:] = rows[:, 1:] != rows[:, :-1]
        place = (first.cumsum(1) - 1)[..., None].expand_as(grad)
        norms = torch.zeros_like(grad).scatter_add_(1, place, grad).flatten(1).norm(dim=1)
        # `weighted_sum` adds in another order; terms that cancel are larger than their sum, and so is their rounding
        rounding = torch.finfo(grad.dtype).eps * grad.shape[1] ** 0.5 * grad.norm(dim=2).sum(1)
        return (norms + rounding).square()

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Sum the gradients of the samples, each times its weight [N]; shape of the table."""
        rows, grad = self._factors()
        result = grad.new_zeros(self.weight.shape)
        weighted = grad * weights.to(grad.dtype)[:, None, None]
        return result.index_add_(0, rows.flatten(), weighted.flatten(0, 1))

    def _grad(self) -> Tensor:
        n, *positions, channels = self.grad.shape
        return self.grad.to(statistics_dtype(self.grad)).reshape(n, math.prod(positions), channels)

    def _factors(self) -> tuple[Tensor, Tensor]:
        return self.x.flatten(1), self._grad()
