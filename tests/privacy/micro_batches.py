"""Gradients of single samples the slow way: batches of one, with the masks that the whole batch had."""

import math
from contextlib import contextmanager
from unittest import mock

import torch

from knlightning.nn import conv_transpose
from knlightning.nn import functional as KF
from knlightning.privacy import PerSampleGradients


class Masks:
    """Draws the masks of kernel normalization in a pass over a batch, and those of a sample alone in passes over it."""

    def __init__(self):
        self.drawn = []  # dropped positions, or masks
        self.sample = None
        self.replayed = 0

    @contextmanager
    def drawing(self, sample=None):
        """Draw for the batch, or repeat what was drawn for one sample of it."""
        self.sample, self.replayed = sample, 0
        if sample is None:
            self.drawn = []
        draw_dropped, draw_mask = KF.draw_dropped, KF.draw_mask

        def dropped(count, dropout_p):
            if self.sample is None:
                self.drawn.append(draw_dropped(count, dropout_p))
                return self.drawn[-1]
            positions = self._next() - self.sample * count
            return positions[(positions >= 0) & (positions < count)]

        def kept(input, dropout_p):
            if self.sample is None:
                self.drawn.append(draw_mask(input, dropout_p))
                return self.drawn[-1]
            return self._next()[self.sample : self.sample + 1]

        with (
            mock.patch.object(KF, "draw_dropped", dropped),
            mock.patch.object(KF, "draw_mask", kept),
            mock.patch.object(conv_transpose, "draw_mask", kept),
        ):
            yield

    def _next(self):
        self.replayed += 1
        return self.drawn[self.replayed - 1]


def micro_batches(net, x, loss, masks):
    """Compute the gradients of the samples [N, *shape] at each trained parameter by name; zeros where there is none.

    `loss` sums the losses of the samples in a slice, given what the network made of them.
    """
    found = {name: [] for name, p in net.named_parameters() if p.requires_grad}
    for sample in range(len(x)):
        net.zero_grad()
        part = slice(sample, sample + 1)
        with masks.drawing(sample):
            loss(net(x[part]), part).backward()
        for name in found:
            parameter = net.get_parameter(name)
            found[name].append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone())
    net.zero_grad()
    return {
        name: torch.stack(grads) if grads else x.new_zeros(0, *net.get_parameter(name).shape)
        for name, grads in found.items()
    }


def norms_of(samples):
    """Compute the norms [N] of the samples' gradients over all parameters."""
    return torch.stack([t[:, None].flatten(1).square().sum(1) for t in samples.values()]).sum(0).sqrt()


def loss_with(coefficients):
    """Make the loss sum(c_n sin(y_n)) of each sample: of any size, and with gradients that differ."""

    def loss(output, part):
        weights = coefficients[part].view(-1, *(1,) * (output.dim() - 1))
        ramp = torch.linspace(0.5, 1.5, math.prod(output.shape[1:]), dtype=output.dtype).view(output.shape[1:])
        return (weights * ramp * output.sin()).sum()

    return loss


def check(net, x, reduction="mean", rtol=1e-9, views=1):
    """Compare norms and weighted sums with micro-batches that have the same masks."""
    net.train()
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(len(x))
    coefficients, weights = torch.rand(2, len(x), dtype=x.dtype, generator=generator) + 0.5
    weights = weights[: len(x) // views]
    loss, masks = loss_with(coefficients), Masks()
    gradients = PerSampleGradients(net, reduction, views)
    gradients.attach()
    with masks.drawing():
        total = loss(net(x), slice(None))
    (total / len(x) if reduction == "mean" else total).backward()
    assert all(p.grad is None and p.requires_grad for p in trained.values())
    norms = gradients.norms()
    gradients.accumulate(weights)
    sums = {name: p.__dict__.pop("summed_grad") for name, p in trained.items()}
    gradients.detach()
    assert not any(hasattr(p, "summed_grad") for p in net.parameters())  # those that are frozen

    expected = micro_batches(net, x, loss, masks)
    if views > 1:
        expected = {name: rows.unflatten(0, (-1, views)).sum(1) for name, rows in expected.items()}
        if reduction == "mean":
            expected = {name: samples / views for name, samples in expected.items()}
    torch.testing.assert_close(norms, norms_of(expected), rtol=rtol, atol=1e-10)
    for name, samples in expected.items():
        wanted = torch.einsum("n,n...->...", weights, samples)
        scale = samples[:, None].flatten(1).norm(dim=1).sum().item()
        torch.testing.assert_close(sums[name], wanted, rtol=rtol, atol=max(rtol * scale, 1e-10), msg=name)
