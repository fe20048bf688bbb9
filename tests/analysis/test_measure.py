import os
from contextlib import closing

import pytest
import torch
from torch import nn

from knlightning.analysis.measure import Probe, Worker, bytes_kept, largest_map, ran_out_of_memory
from knlightning.analysis.variants import Case


def test_bytes_kept_by_hand():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.Sigmoid())
    # the input, the activation that two layers save, and the output; no parameters
    assert bytes_kept(net, torch.rand(2, 4)) == 4 * (2 * 4 + 2 * 3 + 2 * 2)
    whole = torch.rand(10, 4)
    assert bytes_kept(nn.Linear(4, 3), whole[:2]) == 4 * 10 * 4  # a view keeps its whole storage alive


def test_costs_and_times_of_a_network():
    probe = Probe(Case("layers", "kernel", 16, 1, stride=3), "cpu", channels_last=True)
    assert probe.images.is_contiguous(memory_format=torch.channels_last)
    before = [p.detach().clone() for p in probe.net.parameters()]
    costs = probe.costs()
    assert costs["step_peak"] >= costs["evaluation_peak"] >= 0
    assert costs["kept"] >= 4 * (3 * 16 * 16 + 256 * (6 * 6 + 2 * 2 + 1))  # the inputs of the layers at the least
    assert probe.milliseconds("step") > 0
    assert all(torch.equal(a, b) for a, b in zip(before, probe.net.parameters(), strict=True))
    assert all(p.grad is not None for p in probe.net.parameters())


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error, expected):
    assert ran_out_of_memory(error) is expected


def test_a_killed_worker_is_reported_and_other_errors_are_raised():
    with closing(Worker()) as worker:
        assert worker.ask(max, 1, 2) == 2
        with pytest.raises(ValueError, match="invalid literal"):
            worker.ask(int, "x")
        assert worker.ask(os._exit, 9) is None
        assert worker.status == "killed: out of memory?"
        assert worker.ask(max, 1, 2) is None


def test_costs_of_a_network_for_segmentation():
    probe = Probe(Case("fcn_resnet18", "kernel", 16, 2), "cpu", channels_last=True)
    assert (probe.images.shape, probe.whole.shape, probe.labels.shape) == ((2, 3, 16, 32), (1, 3, 32, 64), (2, 16, 32))
    costs = probe.costs()
    # the logits of 32x64 pixels are larger than what 64 filters make of a quarter of them
    assert largest_map(probe.net, probe.whole) == 4 * 19 * 32 * 64
    weights = sum(parameter.nbytes for parameter in probe.net.parameters())
    assert costs["evaluation_maps"] * 4 * 19 * 32 * 64 == pytest.approx(costs["evaluation_peak"] - weights)


def test_largest_map_is_that_of_evaluation():
    net = nn.Sequential(nn.Conv2d(1, 5, 1), nn.MaxPool2d(2)).train()
    assert largest_map(net, torch.rand(1, 1, 6, 4)) == 4 * 5 * 6 * 4
    assert not net.training
