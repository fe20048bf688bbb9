"""Norms and weighted sums of per-sample gradients."""

from typing import Literal

import torch
from lightning.pytorch import LightningModule
from opacus.grad_sample import GradSampleHooks
from torch import Tensor

Clipping = Literal["flat", "automatic"]


class PerSampleGradients:
    """stand-in until the rules land."""

    def __init__(self, module: LightningModule) -> None:
        self.hooks = GradSampleHooks(module, loss_reduction="sum")
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.sums = [torch.zeros(p.shape) for p in self.parameters]

    def _samples(self, p: Tensor, views: int) -> Tensor:
        g = p.grad_sample
        return g.view(-1, views, *p.shape).sum(1)

    def norms(self, views: int = 1) -> Tensor:
        return torch.stack([self._samples(p, views).flatten(1).norm(dim=1) for p in self.parameters]).norm(dim=0)

    def add(self, weights: Tensor, views: int = 1) -> None:
        for p, s in zip(self.parameters, self.sums, strict=True):
            g = self._samples(p, views)
            s += torch.einsum("n,n...->...", weights, torch.where((weights > 0).view(-1, *[1] * p.dim()), g, 0.0))
            p.grad_sample = None
            p.grad = None

    def take(self) -> Tensor:
        total = torch.cat([s.reshape(-1) for s in self.sums])
        for s in self.sums:
            s.zero_()
        return total

    def detach(self) -> None:
        self.hooks.cleanup()
