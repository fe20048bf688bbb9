"""Each part of torch that is not public does what the package takes it for."""

import torch
from torch import nn

from knlightning.internals.torch import is_compiled, version_of

MENDING = "a release of torch has changed this; mend knlightning/internals/torch.py: "


def test_compiled_modules_are_known():
    net = nn.Sequential(nn.Linear(1, 1))
    assert not is_compiled(net), MENDING + "Module._compiled_call_impl is not None before Module.compile()"
    net.compile()
    assert is_compiled(net), MENDING + "Module._compiled_call_impl is None after Module.compile()"
    assert not is_compiled(net[0])


def test_changes_in_place_are_counted():
    x = torch.rand(3)
    before = version_of(x)
    x + 1
    assert version_of(x) == before
    x.detach().mul_(2)
    assert version_of(x) > before, MENDING + "Tensor._version does not grow with a change in place"
