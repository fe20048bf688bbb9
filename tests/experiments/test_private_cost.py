from functools import partial

import pytest
import torch
from torch import nn

from experiments import private_cost
from experiments.private_cost import Step, measure
from knlightning.models import knresnet8, resnet8

SMALL = {"kernel": partial(knresnet8, activation="mish"), "group": partial(resnet8, norm="group", activation="mish")}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("channels_last", [False, True])
def test_all_ways_take_the_same_step_but_for_the_noise(channels_last, monkeypatch):
    found = {}
    for way in ("hooks", "ghost", "book-keeping"):
        step = Step(partial(resnet8, norm="group"), way, 3, channels_last)
        monkeypatch.setattr(step.optimizer, "noise_multiplier", 0.0)
        step()
        found[way] = [p.grad for p in step.net.parameters()]
    for way in ("ghost", "book-keeping"):
        torch.testing.assert_close(found[way], found["hooks"], rtol=1e-3, atol=1e-6)


def test_memory_is_what_is_allocated():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 1000), nn.Tanh(), nn.Linear(1000, 10))
    kept, peak = Step(lambda: net, "plain", 4, channels_last=False).memory()
    weight = 3 * 32 * 32 * 1000 * 4
    assert kept == pytest.approx(4 * 1000 * 4, rel=0.1)  # what tanh has made
    assert peak == pytest.approx(weight, rel=0.1)  # the gradient


@pytest.mark.slow
def test_private_steps_cost_less_than_opacus_takes(monkeypatch, capsys):
    monkeypatch.setattr(private_cost, "NETWORKS", SMALL)
    results = measure(batch_size=4, rounds=1)
    for name in SMALL:
        assert results[name, "plain"] == (1.0, 1.0, 1.0)
        _, kept, peak = results[name, "book-keeping"]
        assert kept < 1.1
        assert peak < 1.5
        assert peak < results[name, "hooks"][2]
    assert capsys.readouterr().out.count("\n| kernel | ") == 4


@pytest.mark.parametrize("name", ["batch_size", "rounds", "threads"])
def test_wrong_arguments_are_named(name):
    with pytest.raises(ValueError, match=f"{name} must be a whole number at least 1"):
        measure(**{name: 0})
