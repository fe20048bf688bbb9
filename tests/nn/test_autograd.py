import itertools

import pytest
import torch
from nn.cases import close, gradients

from knlightning.nn import autograd, fused_kernels, kn_conv
from knlightning.nn.dropout import draw_dropped, mask_of


@pytest.fixture(autouse=True)
def _plain():
    with fused_kernels(False):
        yield


@pytest.mark.parametrize("relu_input", [True, False])
@pytest.mark.parametrize("padding", [1, (1, 0, 1, 0)])
@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("input_format", [torch.contiguous_format, torch.channels_last])
def test_positions_of_dropped_elements_hold_whatever_format_the_gradient_comes_in(
    input_format, weight_format, padding, relu_input
):
    torch.manual_seed(0)
    x = torch.randn(2, 16, 7, 8).contiguous(memory_format=input_format).requires_grad_()
    weight = torch.randn(32, 16, 3, 3).contiguous(memory_format=weight_format)
    torch.manual_seed(1)
    mask = mask_of(draw_dropped(x.numel(), 0.3), x)
    torch.manual_seed(1)
    drawn = kn_conv(x, weight, None, 1, padding, dropout_p=0.3, relu_input=relu_input)
    given_ = kn_conv(x, weight, None, 1, padding, dropout_p=0.3, relu_input=relu_input, mask=mask)
    torch.testing.assert_close(drawn, given_, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients(drawn, [x])[0], gradients(given_, [x])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", ["drawn", "given", "none"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_a_large_batch_is_taken_by_slices(memory_format, which, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(7, 4, 6, 5, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    weight, bias = torch.randn(6, 4, 2, 2, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    inputs = [x, weight.requires_grad_(), bias.requires_grad_(), torch.randn(7, 6, 5, 4, dtype=torch.float64)]
    mask = torch.rand(x.shape) < 0.7 if which == "given" else None

    def all_gradients():
        torch.manual_seed(1)
        p = 0.0 if which == "none" else 0.3
        output = kn_conv(x, weight, bias, dropout_p=p, mask=mask, relu_input=True, residual=inputs[3].requires_grad_())
        return gradients(output, inputs)

    at_once = all_gradients()
    monkeypatch.setattr(autograd, "_LARGE", 3 * 6 * 5 * 4 * 8)  # three samples
    calls = []
    one = autograd._gradients
    monkeypatch.setattr(autograd, "_gradients", lambda grad, *args: calls.append(len(grad)) or one(grad, *args))
    for a, b in zip(all_gradients(), at_once, strict=True):
        close(a, b)
    assert calls == [3, 3, 1]


def test_backward_under_autocast_keeps_the_statistics_exact():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    output = kn_conv(x, torch.randn(8, 8, 3, 3), dropout_p=0.0)
    grad = torch.randn(output.shape)
    (expected,) = torch.autograd.grad(output, x, grad, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (under_autocast,) = torch.autograd.grad(output, x, grad)
    assert torch.equal(under_autocast, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_given_mask_and_a_drawn_one_agree_in_low_precision(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 16, 7, 8).to(dtype).requires_grad_()
    weight = torch.randn(32, 16, 3, 3).to(dtype)
    torch.manual_seed(1)
    mask = mask_of(draw_dropped(x.numel(), 0.3), x)
    torch.manual_seed(1)
    drawn, given_ = kn_conv(x, weight, dropout_p=0.3), kn_conv(x, weight, dropout_p=0.3, mask=mask)
    precision = 4 * torch.finfo(dtype).eps
    one, other = gradients(drawn, [x])[0].float(), gradients(given_, [x])[0].float()
    assert (one - other).norm() < precision * other.norm()


@pytest.mark.parametrize(
    ("statistics", "window"),
    [
        ("trained", {"stride": (1, 2), "padding": (1, 0, 2, 0)}),
        ("trained", {"stride": (1, 2), "padding": 1, "padding_mode": "replicate"}),
        ("trained", {"padding": 1, "padding_mode": "reflect"}),
        ("clean", {"padding": "same", "dilation": (1, 2)}),
        ("clean", {"padding": 1, "padding_mode": "circular"}),
        ("expected", {"padding": "same", "dilation": (2, 1), "padding_mode": "circular"}),
        ("expected", {"stride": (1, 2), "padding": (1, 0, 2, 0)}),
    ],
)
def test_first_and_second_derivatives(statistics, window):
    torch.manual_seed(0)
    shapes = (2, 2, 3, 3), (2, 1, 2, 2), (2,)
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    settings = {"groups": 2, "dropout_p": 0.3, "training": statistics == "trained", **window}
    if statistics != "trained":
        settings["eval_statistics"] = statistics

    def function(x, weight, bias):
        torch.manual_seed(0)  # the same mask each time
        return kn_conv(x, weight, bias, **settings)

    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias), fast_mode=True)


@pytest.mark.parametrize("needed", [n for n in itertools.product([True, False], repeat=3) if any(n)])
def test_only_the_gradients_asked_for_are_computed(needed):
    torch.manual_seed(0)
    full = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4, 4), (5, 3, 2, 2), (5,))]
    reference = gradients(kn_conv(*full, dropout_p=0.0), full)
    some = [t.detach().clone().requires_grad_(n) for t, n in zip(full, needed, strict=True)]
    kn_conv(*some, dropout_p=0.0).backward(torch.cos(torch.arange(2 * 5 * 9.0).double()).reshape(2, 5, 3, 3))
    for tensor, expected, n in zip(some, reference, needed, strict=True):
        assert (tensor.grad is not None) == n
        if n:
            close(tensor.grad, expected)


@pytest.mark.parametrize("relu_output", [True, False])
def test_second_derivatives_with_the_surrounding_operations(relu_output):
    torch.manual_seed(0)
    x, weight, bias, residual = (
        torch.randn(s, dtype=torch.float64, requires_grad=True)
        for s in ((1, 3, 3, 4), (2, 3, 2, 2), (2,), (1, 2, 2, 3))
    )
    mask = torch.rand(x.shape) > 0.3

    def function(x, weight, bias, residual):
        added = None if relu_output else residual
        return kn_conv(
            x, weight, bias, dropout_p=0.3, mask=mask, relu_input=True, relu_output=relu_output, residual=added
        ) + (residual if relu_output else 0)

    assert torch.autograd.gradcheck(function, (x, weight, bias, residual))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias, residual), fast_mode=True)


def test_a_kept_output_may_not_be_changed_in_place():
    x, weight = torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 2, 2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kn_conv(x, weight, keep_output=True).mul_(2).sum().backward()
