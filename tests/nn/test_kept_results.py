import gc
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from knlightning.analysis.measure import bytes_kept
from knlightning.nn import KNConv2d, kn_conv
from knlightning.nn.kept_results import KeptResult


def made(plain):
    """Make the tensors of two layers that run by plain operations in float64, or by the passes for CPUs in float32."""
    torch.manual_seed(0)
    dtype, form = (torch.float64, torch.contiguous_format) if plain else (torch.float32, torch.channels_last)
    x, *weights = torch.randn(2, 4, 6, 5), torch.randn(6, 4, 3, 3), torch.randn(3, 6, 3, 3)
    x, *weights = (t.to(dtype).contiguous(memory_format=form) for t in (x, *weights))
    return [t.requires_grad_() for t in (x, *weights, torch.randn(6, dtype=dtype))]


def clamped(y):
    with torch.no_grad():
        return y.clamp_(max=0.3)


def doubled(y):
    y.register_hook(lambda grad: grad.mul_(2))
    return y


# what happens to an output y before and behind a second layer; whether the first then keeps a tensor of the second, and
# whether it has to convolve again
CASES = {
    "directly": (lambda y, after: after(y), True, False),
    "relu": (lambda y, after: after(y.relu()), True, False),
    "relu in place": (lambda y, after: after(y.relu_()), True, False),
    "relu6": (lambda y, after: after(F.relu6(y)), True, False),
    "relu6 in place": (lambda y, after: after(F.hardtanh(y, -0.5, 0.5, inplace=True)), True, False),
    "two layers": (lambda y, after: after(y.relu()) + after(y), True, True),
    "twice": (lambda y, after: after(y.relu()).sum() + y.sin().sum(), True, True),
    "not behind the relu": (lambda y, after: (after(y.relu()), y.sin())[1], True, True),
    "hook that changes in place": (lambda y, after: after(doubled(y).relu()), True, True),
    "changed behind the layer": (lambda y, after: (after(y), clamped(y).sin())[1], True, True),
    "changed without autograd": (lambda y, after: after(clamped(y)), False, False),
    "changed in front of the relu": (lambda y, after: after(clamped(y).relu()), False, False),
    "changed in place": (lambda y, after: after(y.sigmoid_()), False, False),
    "another activation": (lambda y, after: after(F.silu(y)), False, False),
    "a part": (lambda y, after: after(y[:1].relu()), False, False),
}


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_a_layer_that_keeps_its_own_result(case, plain, monkeypatch):
    follow, handed, again = CASES[case]
    x, weight, second, bias = made(plain)
    results = []
    take = KeptResult.take
    monkeypatch.setattr(KeptResult, "take", lambda *args: results.append(take(*args)) or results[-1])

    def layer(x):
        return kn_conv(x, weight, bias, dropout_p=0.0)

    y = layer(x)
    own, gradient = y.grad_fn.kept, []
    y.register_hook(lambda grad: gradient.append(grad.clone()))
    loss = follow(y, lambda y: kn_conv(y, second, dropout_p=0.0)).square().sum()
    assert own._is_output is handed
    found = torch.autograd.grad(loss, (x, weight, bias))
    assert [results[-1][0] is None, results[-1][1]] == [again, handed]
    expected = torch.autograd.grad(layer(x), (x, weight, bias), gradient[0] * (2 if "hook" in case else 1))
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9 if plain else 1e-4, atol=1e-9 if plain else 1e-5)


@pytest.mark.parametrize("plain", [True, False])
def test_a_graph_can_be_walked_twice(plain):
    x, weight, second, bias = made(plain)
    loss = kn_conv(kn_conv(x, weight, bias, relu_input=True).relu(), second).square().sum()
    found = [torch.autograd.grad(loss, (x, weight, bias), retain_graph=True) for _ in range(2)]
    for once, twice in zip(*found, strict=True):
        torch.testing.assert_close(once, twice)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("activation", ["none", "relu", "relu in place"])
def test_a_stack_of_layers_keeps_little_more_than_plain_ones(activation, memory_format):
    def stack(conv):
        behind = [] if activation == "none" else [torch.nn.ReLU(activation == "relu in place")]
        layers = [layer for _ in range(8) for layer in (conv(64, 64, 3, padding=1), *behind)]
        return torch.nn.Sequential(*layers, torch.nn.AvgPool2d(16)).to(memory_format=memory_format)

    x = torch.randn(2, 64, 16, 16).contiguous(memory_format=memory_format)
    ours, floor = stack(KNConv2d), stack(torch.nn.Conv2d)
    assert bytes_kept(ours, x) < 1.25 * bytes_kept(floor, x)  # the last keeps one more


@pytest.mark.parametrize("plain", [True, False])
def test_hooks_on_saved_tensors_see_all_that_is_kept(plain):
    x, weight, second, bias = made(plain)
    seen, found = [], []
    for hooked in (True, False):
        torch.manual_seed(1)
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t)
        with hooks if hooked else nullcontext():
            y = kn_conv(kn_conv(x, weight, bias, relu_input=True).relu(), second)
        assert (y.grad_fn.kept._tensor is None) is hooked
        found.append(torch.autograd.grad(y.square().sum(), (x, weight, bias)))
    assert seen
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference)


def test_checkpointed_layers_keep_nothing_and_have_the_same_gradient():
    x, weight, second, bias = made(True)

    def layers(x):
        return kn_conv(kn_conv(x, weight, bias, dropout_p=0.0).relu(), second, dropout_p=0.0)

    y = checkpoint(layers, x, use_reentrant=False)
    kept = [node.kept._tensor for node in (y.grad_fn, y.grad_fn.next_functions[0][0].next_functions[0][0])]
    assert kept == [None, None]
    found = [torch.autograd.grad(out.square().sum(), (x, weight, bias)) for out in (y, layers(x))]
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("backward", [True, False])
def test_nothing_keeps_itself(backward):
    x, weight, second, bias = made(False)
    gc.disable()
    try:
        z = kn_conv(x, weight, bias).relu()
        y = kn_conv(z, second)
        storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in (z, y)]
        if backward:
            y.sum().backward()
        del y, z
        assert all(storage.expired() for storage in storages)
    finally:
        gc.enable()
