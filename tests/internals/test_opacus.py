"""Each part of Opacus that is not public does what the package takes it for."""

import pytest
import torch
from opacus.grad_sample import GradSampleHooks
from torch import nn

from knlightning.internals.opacus import passes_awaiting_gradients

MENDING = "a release of Opacus has changed this; mend knlightning/internals/opacus.py: "


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # of the first layer
def test_passes_are_counted():
    layer = nn.Linear(2, 2)
    hooks = GradSampleHooks(layer)
    x = torch.rand(3, 2)
    outputs = [layer(x), layer(x)]
    assert passes_awaiting_gradients(layer) == 2, MENDING + "layer.activations does not hold the forward passes"
    outputs[1].sum().backward()
    assert passes_awaiting_gradients(layer) == 1, MENDING + "layer.activations does not lose a pass in backward"
    hooks.remove_hooks()
