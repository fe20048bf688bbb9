"""Measure how much of the speed of two processes comes through: KNResNet-18 on images of 32x32 pixels, on a CPU.

    python experiments/efficiency.py

Each process has one thread. In a round, one of them trains alone, then both without each other, then both together by
torch's DistributedDataParallel, with each of its options. Their speeds are compared within a round, over twice that of
one alone: a machine that does other things slows all of them. Both without each other tell what the processors share,
such as caches; the rest is the cost of adding gradients.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from knlightning.checks import check_number
from knlightning.commands.command import command
from knlightning.models import knresnet18

ALONE, APART = "one process", "two without each other"
OPTIONS: dict[str, dict[str, Any]] = {
    "two together": {},
    "`gradient_as_bucket_view`": {"gradient_as_bucket_view": True},
    "`static_graph`": {"static_graph": True},
    "both": {"gradient_as_bucket_view": True, "static_graph": True},
}


def _network() -> nn.Module:
    network: nn.Module = knresnet18(num_classes=100, low_resolution=True)
    return network


def _step(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    network.zero_grad()
    cross_entropy(network(images), labels).backward()


def _seconds(run: Callable[[], None], steps: int) -> float:
    """Time steps of all processes, from when all are ready until all are done."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        run()
    dist.barrier()
    return time.perf_counter() - start


def _work(rank: int, meeting: str, batch_size: int, steps: int, rounds: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    images, labels = torch.rand(batch_size, 3, 32, 32), torch.randint(100, (batch_size,))
    networks: dict[str, nn.Module] = {APART: _network()}
    networks |= {name: DistributedDataParallel(_network(), **o) for name, o in OPTIONS.items()}
    for _ in range(rounds + 1):
        idle = _seconds(lambda: _step(networks[APART], images, labels) if rank == 0 else None, steps)
        speeds = {ALONE: steps * batch_size / idle}
        for name, network in networks.items():
            speeds[name] = 2 * steps * batch_size / _seconds(partial(_step, network, images, labels), steps)
        if rank == 0:
            results.put(speeds)
    dist.destroy_process_group()


def measure(batch_size: int = 16, steps: int = 2, rounds: int = 7) -> dict[str, float]:
    """Measure efficiency; print a table.

    Args:
        batch_size: Images in a batch of one process.
        steps: Steps of each way in a round, forward and backward.
        rounds: Rounds over which medians are taken, after one to warm up.

    Returns:
        For each way its speed over twice that of one process.

    Raises:
        ArgumentError: If an argument is out of its range.
    """
    for name, value in {"batch_size": batch_size, "steps": steps, "rounds": rounds}.items():
        check_number(name, value, at_least=1, integer=True)
    results = get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        spawn(_work, (f"{folder}/meeting", batch_size, steps, rounds, results), nprocs=2)
    speeds = [results.get() for _ in range(rounds + 1)][1:]
    print(f"Images a second, and over twice that of one process; medians of {rounds} rounds\n")
    print("| | images/s | efficiency (range) |\n| --- | --- | --- |")
    found = {}
    for name in speeds[0]:
        paired = [speed[name] / (speed[ALONE] * (1 if name == ALONE else 2)) for speed in speeds]
        found[name] = statistics.median(paired)
        middle = statistics.median(speed[name] for speed in speeds)
        print(f"| {name} | {middle:.1f} | {found[name]:.2f} ({min(paired):.2f} to {max(paired):.2f}) |")
    return found


if __name__ == "__main__":
    command(measure, "python experiments/efficiency.py")
