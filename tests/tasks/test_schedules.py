import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, PolynomialLR, SequentialLR

from knlightning.tasks import CosineLR, PolyLR


def optimizer(lr=0.4):
    return SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def rates(scheduler, steps):
    seen = []
    for _ in range(steps):
        seen.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return seen


def test_rate_falls_along_half_a_cosine_as_that_of_torch():
    seen = rates(CosineLR(optimizer(), final=0.1, total=7), 10)
    assert seen[:8] == pytest.approx(rates(CosineAnnealingLR(optimizer(), T_max=7, eta_min=0.1 * 0.4), 8))
    assert seen[7:] == [pytest.approx(0.04)] * 3  # the end, and after it


def test_warmup_rises_linearly_and_is_part_of_the_length():
    seen = rates(CosineLR(optimizer(), final=0.01, total=8, warmup=4, warmup_start=0.2), 10)
    assert seen[:5] == pytest.approx([0.4 * fraction for fraction in (0.2, 0.4, 0.6, 0.8, 1.0)])
    assert seen[6] == pytest.approx(0.4 * (0.01 + 0.99 / 2))  # half of the way from the warm-up to the end
    assert seen[8:] == pytest.approx([0.004] * 2)


def test_warmup_agrees_with_the_recipe_of_torchvision():
    theirs = optimizer()
    warmup = LinearLR(theirs, start_factor=0.01, total_iters=5)
    main = CosineAnnealingLR(theirs, T_max=600 - 5, eta_min=0.0)
    expected = rates(SequentialLR(theirs, [warmup, main], milestones=[5]), 600)
    assert rates(CosineLR(optimizer(), total=600, warmup=5), 600) == pytest.approx(expected, abs=1e-9)


def test_run_shorter_than_the_warmup_ends_within_it():
    scheduler = CosineLR(optimizer(), warmup=5, warmup_start=0.0)
    scheduler.total = 2  # as the task does; of `fast_dev_run` alone it does not check it
    assert rates(scheduler, 3) == pytest.approx([0.0, 0.08, 0.16])


@pytest.mark.parametrize("power", [0.9, 2.0])
def test_poly_agrees_with_its_formula_and_torch(power):
    seen = rates(PolyLR(optimizer(), power=power, total=7), 9)
    assert seen[0] == 0.4
    assert seen == pytest.approx([0.4 * max(1 - step / 7, 0) ** power for step in range(9)])
    assert seen == pytest.approx(rates(PolynomialLR(optimizer(), total_iters=7, power=power), 9), abs=1e-12)


def test_every_parameter_group_keeps_its_own_rate():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.4, 0.1)]
    scheduler = PolyLR(SGD(groups), power=1.0, total=4)
    rates(scheduler, 3)
    assert [group["lr"] for group in scheduler.optimizer.param_groups] == pytest.approx([0.1, 0.025])


@pytest.mark.parametrize(
    ("schedule", "arguments"),
    [
        (CosineLR, {"final": -0.1}),
        (CosineLR, {"final": 1.5}),
        (CosineLR, {"warmup": -1}),
        (CosineLR, {"warmup": 5, "total": 5}),
        (CosineLR, {"warmup_start": 1.1}),
        (PolyLR, {"power": 0.0}),
        (PolyLR, {"total": 0}),
    ],
)
def test_arguments_out_of_range(schedule, arguments):
    with pytest.raises(ValueError, match=f"^{next(iter(arguments))} must be"):
        schedule(optimizer(), **arguments)


@pytest.mark.parametrize("schedule", [CosineLR, PolyLR])
def test_length_must_be_known(schedule):
    scheduler = schedule(optimizer())
    scheduler.optimizer.step()
    with pytest.raises(ValueError, match=rf"{schedule.__name__}\(optimizer, total=150\)"):
        scheduler.step()
