import torch

from knlightning.internals.torch import function_transforms_active


def test_transforms_are_seen_while_they_run():
    seen = []

    def function(x):
        seen.append(function_transforms_active())
        return x

    torch.func.grad(function)(torch.ones(()))
    torch.func.vmap(function)(torch.ones(1))
    function(torch.ones(()))
    hint = "torch tells in another way that a transform runs: see what torch.autograd.Function.apply itself asks"
    assert seen == [True, True, False], hint
