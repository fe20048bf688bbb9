import pytest
import torch
from torch import nn

from experiments.convert_networks import convert_networks, describe, train_step


def test_the_table(capsys):
    convert_networks(["squeezenet1_1"])
    heading, _, row = capsys.readouterr().out.splitlines()
    assert heading.startswith("| network |")
    assert row == "| torchvision/squeezenet1_1 | no | 0 of 26 | | | 26 Conv2d (no pair) |"


def test_what_is_left_is_counted_by_type_and_reason():
    net = nn.ModuleDict({"a": nn.Conv2d(1, 1, 1), "b": nn.Conv2d(1, 1, 1), "c": nn.ReLU()})
    left = {
        "a": "goes to x: Conv2d computes another",
        "b": "it is not called",
        "c": "Net cannot be traced",
    }
    assert describe(net, left) == (
        "1 Conv2d (computes something else than a convolution); 1 Conv2d (no pair); 1 ReLU (not traced)"
    )


@pytest.mark.parametrize(("norm", "independent"), [(nn.BatchNorm2d(3), False), (nn.GroupNorm(1, 3), True)])
def test_a_step_tells_whether_samples_are_independent(norm, independent):
    assert train_step(nn.Sequential(norm, nn.Conv2d(3, 2, 1), nn.Flatten()), (3, 4, 4)) is independent


def test_a_gradient_that_is_not_finite_is_an_error():
    layer = nn.Linear(2, 2)
    layer.weight.data.fill_(torch.inf)
    with pytest.raises(ArithmeticError, match="a gradient is not finite"):
        train_step(layer, (2,))
