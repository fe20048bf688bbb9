import math

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from knlightning.tasks import CosineLR


def optimizer(lr=0.4):
    return SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def rates(scheduler, steps):
    seen = []
    for _ in range(steps):
        seen.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return seen


def test_rate_falls_along_half_a_cosine():
    seen = rates(CosineLR(optimizer(), final=0.01, total=4), 6)
    half, quarter = (1 + math.cos(math.pi / 2)) / 2, (1 + math.cos(math.pi / 4)) / 2
    assert seen[0] == 0.4
    assert seen[1] == pytest.approx(0.4 * (0.01 + 0.99 * quarter))
    assert seen[2] == pytest.approx(0.4 * (0.01 + 0.99 * half))
    assert seen[4:] == [pytest.approx(0.004)] * 2  # the end, and after it


def test_agrees_with_torch():
    ours, theirs = optimizer(), optimizer()
    expected = rates(CosineAnnealingLR(theirs, T_max=7, eta_min=0.1 * 0.4), 8)
    assert rates(CosineLR(ours, final=0.1, total=7), 8) == pytest.approx(expected)


@pytest.mark.parametrize("arguments", [{"final": -0.1}, {"final": 1.5}, {"total": 0}])
def test_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        CosineLR(optimizer(), **arguments)


def test_length_must_be_known():
    scheduler = CosineLR(optimizer())
    scheduler.optimizer.step()
    with pytest.raises(ValueError, match="total"):
        scheduler.step()
