"""Convolutions of single pixels in channels-last float32 on a CPU; they need a C++ compiler."""

import itertools

import pytest
import torch
from nn.cases import compare

from knlightning.nn import KNConv2d, kn_conv, pointwise
from knlightning.nn.cpu_passes import mask_of_seed
from knlightning.nn.functional import normalization_of
from knlightning.nn.fused import draw_seed


def images(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    monkeypatch.setattr(pointwise, "is_faster", lambda *_: True)


@pytest.mark.parametrize(
    ("relu_input", "after", "statistics", "groups"),
    list(itertools.product([True, False], ["", "relu", "residual"], ["trained", "expected"], [1, 2])),
)
def test_outputs_and_gradients(relu_input, after, statistics, groups):
    """Equal those of plain operations in float64, and without a gradient the output is the same."""
    torch.manual_seed(0)
    p, training = 0.3, statistics == "trained"
    x, weight = images(3, 38, 5, 7) + 0.3, torch.randn(6, 38 // groups, 1, 1) / 6
    inputs = [t.requires_grad_() for t in (x, weight)] + [torch.randn(6, requires_grad=True)] * (groups == 1)
    around = {"relu_input": relu_input, "relu_output": after == "relu"}
    if after == "residual":
        around["residual"] = images(3, 6, 5, 7).requires_grad_()
        inputs.append(around["residual"])
    exact = [t.detach().double().requires_grad_() for t in inputs]
    filters = slice(2 + (groups == 1))
    arguments = {"groups": groups, "dropout_p": p, "training": training}
    torch.manual_seed(5)
    mask = mask_of_seed(draw_seed(x.device), x, p) if training else None
    torch.manual_seed(5)
    ours = kn_conv(*inputs[filters], **arguments, **around)
    assert ours.grad_fn.name() == "PointwiseBackward"
    torch.manual_seed(5)
    with torch.no_grad():
        assert torch.equal(ours, kn_conv(*inputs[filters], **arguments, **around))
    reference = around | ({"residual": exact[-1]} if after == "residual" else {})
    compare(ours, inputs, kn_conv(*exact[filters], mask=mask, **arguments, **reference), exact, 2e-6)


def test_second_derivatives_are_those_of_the_plain_path():
    torch.manual_seed(0)
    x, weight = images(1, 3, 3, 4).requires_grad_(), torch.randn(2, 3, 1, 1, requires_grad=True)
    torch.manual_seed(5)
    mask = mask_of_seed(draw_seed(x.device), x, 0.3)

    def second(**given):
        torch.manual_seed(5)
        first = torch.autograd.grad(kn_conv(x, weight, dropout_p=0.3, **given).cos().sum(), x, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), (x, weight))

    for ours, plain in zip(second(), second(mask=mask), strict=True):  # a given mask takes the plain path
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)


def test_only_the_gradients_asked_for_are_computed():
    layer = KNConv2d(4, 6, 1).to(memory_format=torch.channels_last)
    layer.weight.requires_grad_(False)
    layer(images(2, 4, 3, 3)).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((6,), 18.0))


def test_its_moments_are_found_for_private_training():
    x = images(1, 4, 5, 5)
    found = normalization_of(kn_conv(x, torch.randn(3, 4, 1, 1, requires_grad=True), dropout_p=0.0, eps=0.0))
    torch.testing.assert_close(found.mean, x.mean(1, keepdim=True))
    torch.testing.assert_close(found.rstd, x.var(1, correction=0, keepdim=True).rsqrt())
    assert torch.equal(found.input, x)


@pytest.mark.parametrize(
    ("channels", "filters", "size", "around", "learning", "faster"),
    [
        (64, 256, 32, {}, True, True),
        (256, 64, 32, {}, True, False),
        (64, 256, 32, {"relu_output": True}, True, False),
        (64, 256, 32, {}, False, False),
        (2048, 512, 4, {"relu_output": True}, False, True),
        (64, 256, 32, {"stride": 2}, True, False),
        (64, 256, 32, {"padding": 1}, True, False),
    ],
)
def test_where_it_is_taken(channels, filters, size, around, learning, faster, monkeypatch):
    monkeypatch.undo()
    taken = []
    monkeypatch.setattr(pointwise, "forward", lambda call: taken.append(call) or (call.input,) * 3)
    x, weight = images(1, channels, size, size), torch.zeros(filters, channels, 1, 1, requires_grad=True)
    with torch.set_grad_enabled(learning):
        kn_conv(x, weight, dropout_p=0.0, **around)
    assert bool(taken) is faster
