"""Measure what private training costs: time and memory of a private step over those of a step without privacy.

    python experiments/private_cost.py

A private step clips the gradient of each sample and adds noise to their sum. It is taken in the ways of Opacus and in
that of `knlightning.privacy.PerSampleGradients`; each network is compared with its own step without privacy.
Opacus has no rules for class tokens and position embeddings: these are frozen in its ways.

The ways run one after the other, so that a machine that becomes slower slows all; ratios are taken within a round.
Memory is what torch's allocator hands out, less that before the step: at the peak of the step, and still in use after
the forward pass.
"""

import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import timm
import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from opacus.grad_sample.conv import compute_conv_grad_sample
from opacus.grad_sample.group_norm import compute_group_norm_grad_sample
from opacus.grad_sample.layer_norm import compute_layer_norm_grad_sample
from opacus.grad_sample.linear import compute_linear_grad_sample, compute_linear_norm_sample
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from torch import nn
from torch.profiler import ProfilerActivity, profile

from knlightning.checks import check_number
from knlightning.commands.command import command
from knlightning.models import knresnet18, resnet18
from knlightning.privacy import PerSampleGradients, register_opacus_rules, watch_statistics
from knlightning.privacy.rules import TYPES

Way = Literal["plain", "hooks", "ghost", "book-keeping"]

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "KNResNet-18": partial(knresnet18, num_classes=10, low_resolution=True, activation="mish"),
    "ViT-Tiny": partial(timm.create_model, "vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10),
    "ResNet-18 GroupNorm": partial(resnet18, num_classes=10, norm="group", low_resolution=True, activation="mish"),
}

register_opacus_rules()  # before the hooks of any network, and for those of KNConv below


OWN_RULES = {
    nn.Conv2d: compute_conv_grad_sample,
    nn.GroupNorm: compute_group_norm_grad_sample,
    nn.LayerNorm: compute_layer_norm_grad_sample,
    nn.Linear: compute_linear_grad_sample,
}


class OpacusHooks(GradSampleHooks):
    """Opacus as it comes, where it has rules of its own; that of convolutions is wrong of channels-last images."""

    GRAD_SAMPLERS = {**GradSampleHooks.GRAD_SAMPLERS, **OWN_RULES}  # noqa: RUF012 # as in the base


class OpacusGhost(GradSampleHooksFastGradientClipping):
    """Ghost clipping of Opacus with its own rules; it has no norms of convolutions."""

    GRAD_SAMPLERS = OpacusHooks.GRAD_SAMPLERS
    NORM_SAMPLERS = {  # noqa: RUF012 # as in the base
        **GradSampleHooksFastGradientClipping.NORM_SAMPLERS,
        nn.Linear: compute_linear_norm_sample,
    }


class Step:
    """A training step at 32x32 of one network in one way.

    Args:
        make: Makes the network.
        way: "plain", without privacy; "hooks", Opacus with its own rules where they are right; "ghost", Opacus with two
            backward passes, and with the rules of this package for convolutions, whose norms it has none of;
            "book-keeping", one backward pass.
        batch_size: Images in the batch.
        channels_last: Memory format of images and weights.
    """

    def __init__(self, make: Callable[[], nn.Module], way: Way, batch_size: int, channels_last: bool) -> None:
        torch.manual_seed(0)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.way = way
        self.net = make().to(memory_format=layout)
        self.images = torch.rand(batch_size, 3, 32, 32).contiguous(memory_format=layout)
        self.labels = torch.randint(10, (batch_size,))
        if way in ("hooks", "ghost"):
            for module in self.net.modules():
                if type(module) not in TYPES:
                    for parameter in module.parameters(recurse=False):
                        parameter.requires_grad_(False)
        # The learning rate is 0: nothing diverges, and the time is the same.
        sgd = torch.optim.SGD([p for p in self.net.parameters() if p.requires_grad], lr=0.0)
        self.optimizer: torch.optim.Optimizer = sgd
        kind = DPOptimizerFastGradientClipping if way == "ghost" else DPOptimizer
        if way != "plain":
            noise = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": batch_size}
            self.optimizer = kind(sgd, **noise)
        if way == "hooks":
            (GradSampleHooks if channels_last else OpacusHooks)(self.net)
        elif way == "ghost":
            self.ghost = (GradSampleHooksFastGradientClipping if channels_last else OpacusGhost)(self.net)
        elif way == "book-keeping":
            self.gradients = PerSampleGradients(self.net)
            self.gradients.attach()
        if way in ("hooks", "ghost"):
            watch_statistics(self.net)

    def __call__(self) -> None:
        """Take a step."""
        self.optimizer.zero_grad()
        output = self.net(self.images)
        loss = F.cross_entropy(output, self.labels)
        if self.way == "ghost":
            (grad,) = torch.autograd.grad(loss, output, retain_graph=True)
            loss.backward(retain_graph=True)
            self.optimizer.zero_grad()
            self.ghost.disable_hooks()
            output.backward(grad * len(output) * self.ghost.get_clipping_coef()[:, None])
            self.ghost.enable_hooks()
        else:
            loss.backward()
        if self.way == "book-keeping":
            norms = self.gradients.norms()
            self.gradients.accumulate((1.0 / norms).clamp(max=1.0))
            assert isinstance(self.optimizer, DPOptimizer)
            self.optimizer.add_noise()
            for parameter in self.optimizer.params:
                parameter.grad /= len(output)
            self.optimizer.original_optimizer.step()
        else:
            self.optimizer.step()

    def seconds(self) -> float:
        """Time a step."""
        start = time.perf_counter()
        self()
        elapsed = time.perf_counter() - start
        self.optimizer.zero_grad()  # the networks that it is compared with need the memory now
        return elapsed

    def memory(self) -> tuple[int, int]:
        """Measure a step.

        Returns:
            Bytes in use after the forward pass, and at the peak of the step, both less those before it.
        """
        self.optimizer.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as forward:
            output = self.net(self.images)
        kept = _allocations(forward)[-1]
        F.cross_entropy(output, self.labels).backward()
        del output
        if self.way == "book-keeping":
            self.gradients.release()
        for parameter in self.net.parameters():  # what Opacus leaves behind
            for name in ("grad", "grad_sample", "_norm_sample"):
                if hasattr(parameter, name):
                    setattr(parameter, name, None)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as step:
            self()
        return kept, max(_allocations(step))


def _allocations(profiled: profile) -> list[int]:
    """List the bytes in use after each allocation and each release, less those before the first."""
    assert profiled.profiler is not None
    results: Any = profiled.profiler.kineto_results
    used, total = [0], 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        total += event.nbytes()
        used.append(total)
    return used


def measure(
    batch_size: int = 32, rounds: int = 7, channels_last: bool = False, threads: int | None = None
) -> dict[tuple[str, Way], tuple[float, float, float]]:
    """Compare private steps with steps without privacy; print a table.

    Args:
        batch_size: Images in a batch.
        rounds: Rounds over which medians are taken, after one to warm up.
        channels_last: Memory format of images and weights.
        threads: Threads of torch, or None for its default.

    Returns:
        For each network and way the ratios of time (a median), of bytes kept and of the peak.

    Raises:
        ArgumentError: If an argument is out of its range.
    """
    check_number("batch_size", batch_size, at_least=1, integer=True)
    check_number("rounds", rounds, at_least=1, integer=True)
    check_number("threads", threads, at_least=1, integer=True, none="the default of torch")
    if threads is not None:
        torch.set_num_threads(threads)
    ways: tuple[Way, ...] = get_args(Way)
    steps = {(name, way): Step(make, way, batch_size, channels_last) for name, make in NETWORKS.items() for way in ways}
    seconds: dict[tuple[str, Way], list[float]] = {key: [] for key in steps}
    with warnings.catch_warnings():
        # hooks at the first layer, whose images need no gradient; gradients of filters that are few elements wide
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout contract", UserWarning)
        memory = {key: step.memory() for key, step in steps.items()}  # warms up too
        for _ in range(rounds):
            for key, step in steps.items():
                seconds[key].append(step.seconds())
    results = {}
    print(f"32x32, batches of {batch_size}, {torch.get_num_threads()} threads; medians of {rounds} rounds\n")
    print("| network | step | s | time | kept | peak |\n| --- | --- | --- | --- | --- | --- |")
    for (name, way), times in seconds.items():
        plain: tuple[str, Way] = name, "plain"
        ratio = statistics.median(ours / theirs for ours, theirs in zip(times, seconds[plain], strict=True))
        kept, peak = (ours / theirs for ours, theirs in zip(memory[name, way], memory[plain], strict=True))
        results[name, way] = ratio, kept, peak
        row = [name, way, f"{statistics.median(times):.2f}", f"{ratio:.2f} x"]
        for of, bytes_ in zip((kept, peak), memory[name, way], strict=True):
            row.append(f"{of:.2f} x ({bytes_ / 2**20:,.0f} MiB)")
        print(f"| {' | '.join(row)} |", flush=True)
    return results


if __name__ == "__main__":
    command(measure, "python experiments/private_cost.py")
