import math

import pytest
import torch
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import OneCycleLR

from knlightning.checks import ArgumentError
from knlightning.tasks.optimizer_settings import check_layers, check_settings


def parameters():
    return [torch.nn.Parameter(torch.zeros(2))]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda params: SGD(params, lr=0.1, momentum=math.nan), "momentum"),
        (lambda params: SGD(params, lr=1e308), "lr"),
        (lambda params: SGD(params, lr=0.1, weight_decay=math.inf), "weight_decay"),
        (lambda params: Adam(params, eps=math.inf), "eps"),
        (lambda params: SGD([{"params": params, "weight_decay": math.nan}], lr=0.1), "weight_decay"),
    ],
)
def test_settings_that_are_not_finite(make, name):
    with pytest.raises(ArgumentError, match=f"^{name} must be finite in float32 for the optimizer"):
        check_settings(make(parameters()))


@pytest.mark.parametrize("settings", [{"dampening": -1}, {"dampening": 2.0**70}, {"momentum": 1.5}])
def test_settings_with_a_range(settings):
    (name,) = settings
    with pytest.raises(ArgumentError, match=f"^{name} must be a number at least 0 and at most 1"):
        check_settings(SGD(parameters(), lr=0.1, **settings))


def test_layers():
    check_layers(torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Hardtanh(0, math.inf)))
    with pytest.raises(ArgumentError, match=r"^p must be a number for the layer 0 \(Dropout\), got nan"):
        check_layers(torch.nn.Sequential(torch.nn.Dropout(math.nan)))


def test_parts_of_tuples():
    optimizer = Adam(parameters())
    optimizer.param_groups[0]["betas"] = (0.9, math.nan)
    with pytest.raises(ArgumentError, match=r"^betas\[1\] must be finite"):
        check_settings(optimizer)


def test_settings_of_a_schedule():
    optimizer = SGD(parameters(), lr=0.1, momentum=0.9)
    OneCycleLR(optimizer, max_lr=1e40, total_steps=10)
    with pytest.raises(ArgumentError, match=r"must be finite"):
        check_settings(optimizer)


def test_good_settings():
    check_settings(SGD(parameters(), lr=torch.tensor(0.1), momentum=0.9, foreach=None, nesterov=True))
    check_settings(Adam(parameters(), betas=(0.0, 0.999), amsgrad=True))
