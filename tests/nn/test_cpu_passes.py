"""The compiled passes, which convolutions in channels-last float32 take on a CPU; they need a C++ compiler."""

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from nn import naive
from nn.cases import cases, compare
from torch.utils.checkpoint import checkpoint

from knlightning.nn import KNConv2d, composite, cpu_passes, fused_kernels, kn_conv
from knlightning.nn.composite import Call, Settings
from knlightning.nn.cpu_passes import library, mask_of_seed
from knlightning.nn.functional import normalization_of
from knlightning.nn.fused import draw_seed, find_passes
from knlightning.nn.statistics import pixel_moments
from knlightning.nn.windows import Window

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
SEED = torch.tensor([12345])


def drawn_mask(input, p):
    """The mask that a call after `torch.manual_seed(5)` draws."""
    torch.manual_seed(5)
    return mask_of_seed(draw_seed(input.device), input, p)


def is_compiled(output):
    return output.grad_fn.name() in ("_EagerBackward", "PointwiseBackward")


def images(*shape):
    return torch.randn(shape).contiguous(memory_format=FORMATS[len(shape)])


@settings(max_examples=25, deadline=None)
@given(cases())
def test_cases_of_all_kinds_equal_the_definition(case):
    assume(case.x.dim() > 3)
    case.rest["eps"] = 1.0  # 1 / sqrt(eps) magnifies the rounding of float32 in windows that are nearly constant
    case.x = 3 * case.x.detach() / case.x.abs().max() if case.x.numel() else case.x
    inputs = [t.detach().float() for t in case.tensors()]
    for i in (0, 1):
        inputs[i] = inputs[i].contiguous(memory_format=FORMATS[case.x.dim()])
    exact = [t.double().requires_grad_() for t in inputs]
    (x, weight, *rest), (input, filters, *bias) = exact, [t.requires_grad_() for t in inputs]
    mode = case.rest["padding_mode"]
    padded = input if mode == "zeros" or not any(case.pads) else torch.nn.functional.pad(input, case.pads, mode)
    assume(find_passes(padded, filters) is not None)  # with one channel it may be in either format
    mask = drawn_mask(padded.detach(), case.p) if case.p else None
    reference = naive.kn_conv(
        x, weight, rest[0] if rest else None, case.stride, case.pads, case.groups, mask, case.p, **case.rest
    )
    arguments = (bias[0] if bias else None, case.stride, case.padding, case.groups, case.p)
    torch.manual_seed(5)
    ours = kn_conv(input, filters, *arguments, **case.rest)
    assert is_compiled(ours)
    compare(ours, inputs, reference, exact, 1e-4)


@pytest.mark.parametrize(
    ("relu_input", "after", "statistics", "bias"),
    list(itertools.product([True, False], ["", "keep", "relu", "residual"], ["trained", "expected"], [True, False])),
)
def test_the_operations_around_the_convolution(relu_input, after, statistics, bias):
    torch.manual_seed(0)
    p, training = 0.3, statistics == "trained"
    x, weight = images(3, 37, 5, 7) + 0.3, images(6, 37, 2, 3) / 30
    mask = drawn_mask(x, p) if training else None
    inputs = [t.requires_grad_() for t in (x, weight)] + [torch.randn(6, requires_grad=True)] * bias
    around = {"relu_input": relu_input, "relu_output": after == "relu", "keep_output": after == "keep"}
    if after == "residual":
        around["residual"] = images(3, 6, 5, 4).requires_grad_()
        inputs.append(around["residual"])
    exact = [t.detach().double().requires_grad_() for t in inputs]
    arguments = {"dropout_p": p, "training": training, "stride": (1, 2), "padding": (2, 1, 1, 0)}
    arguments["eval_statistics"] = "clean" if training else statistics
    torch.manual_seed(5)
    ours = kn_conv(*inputs[: 2 + bias], **arguments, **around)
    assert is_compiled(ours)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.manual_seed(5)
    with torch.no_grad():
        assert torch.equal(ours, kn_conv(*inputs[: 2 + bias], **arguments, **around))
    reference = around | ({"residual": exact[-1]} if after == "residual" else {})
    expected = kn_conv(*exact[: 2 + bias], mask=mask, **arguments, **reference)
    compare(ours, inputs, expected, exact, 2e-6)


def test_threads_change_nothing_but_the_order_of_sums(monkeypatch):
    torch.manual_seed(0)
    inputs = [t.requires_grad_() for t in (images(4, 64, 24, 24), images(64, 64, 3, 3) / 24, torch.randn(64))]
    direction = images(4, 64, 22, 22)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 1, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(5)
        output = kn_conv(*inputs, relu_input=True)
        found.append((output, *torch.autograd.grad(output, inputs, direction)))
    torch.set_num_threads(before)
    assert is_compiled(output)
    for one, again, several in zip(*found, strict=True):
        assert torch.equal(one, again)
        torch.testing.assert_close(one, several, rtol=1e-4, atol=1e-4)


def test_moments_are_exact_where_the_mean_is_far_above_the_spread():
    torch.manual_seed(0)
    x = 1e4 + images(2, 130, 4, 9)
    weight, window = images(5, 130, 1, 1), Window.of(2, 1)
    settings = Settings(window, 1, 0.0, 1.0, 0.0, True, False)
    mean, rstd, sums, rectified = cpu_passes.moments(Call(x, weight, None, None, None, settings))
    exact_mean, exact_var = pixel_moments(x.double(), None, 0.0)
    assert torch.equal(rectified, x)
    torch.testing.assert_close(sums, weight.sum((1, 2, 3)))
    torch.testing.assert_close(mean.double(), exact_mean, rtol=2e-7, atol=0)
    torch.testing.assert_close(rstd.double(), exact_var.rsqrt(), rtol=1e-3, atol=0)
    settings = Settings(window, 1, 0.3, 1.0, 0.0, False, False)
    dropped_mean, dropped_rstd, _, _ = cpu_passes.moments(Call(x, weight, None, None, SEED, settings))
    mean, var = pixel_moments(x, mask_of_seed(SEED, x, 0.3), 0.3)
    torch.testing.assert_close((dropped_mean, dropped_rstd), (mean, var.rsqrt()), rtol=1e-5, atol=0)


def test_constant_pixels_of_many_channels_become_zero():
    x = torch.full((1, 2048, 2, 2), 1000.1).contiguous(memory_format=torch.channels_last)
    settings = Settings(Window.of(2, 1), 1, 0.0, 1.0, 1e-5, False, False)
    output, mean, _ = cpu_passes.standardize(Call(x, torch.ones(1, 2048, 1, 1), None, None, None, settings))
    assert not output.any()
    assert torch.equal(mean, x[:, :1])


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_masks_look_independent(p):
    """Their shares, and those of pairs of neighbours and of two seeds: each within five deviations."""
    x = torch.empty(8, 256, 32, 32).contiguous(memory_format=torch.channels_last)
    first, other = (~mask_of_seed(torch.tensor([seed]), x, p) for seed in (5, 6))
    pairs = [(first[:, :-1], first[:, 1:]), (first[..., :-1], first[..., 1:]), (first[:-1], first[1:]), (first, other)]
    for drawn, share in [(first, p), *((a & b, p**2) for a, b in pairs)]:
        deviation = (share * (1 - share) / drawn.numel()) ** 0.5
        assert abs(drawn.double().mean() - share) < 5 * deviation


def test_what_is_not_a_number_stays_so():
    x, weight = images(1, 4, 3, 3), images(2, 4, 1, 1)
    x[0, 1, 1, 1] = float("nan")
    assert kn_conv(x, weight, relu_input=True, relu_output=True).isnan().sum() == 2


def test_checkpointing_draws_the_same_mask_again():
    layer = KNConv2d(4, 6, 2, dropout_p=0.3).to(memory_format=torch.channels_last)
    x = images(1, 4, 4, 4).requires_grad_()
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(0)
        found.append(torch.autograd.grad(run(x).square().sum(), (x, *layer.parameters())))
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


def test_second_derivatives_are_those_of_the_plain_path():
    torch.manual_seed(0)
    x, weight = images(1, 3, 3, 4).requires_grad_(), images(2, 3, 2, 2).requires_grad_()
    mask = drawn_mask(x.detach(), 0.3)

    def second(**given):
        torch.manual_seed(5)
        first = torch.autograd.grad(kn_conv(x, weight, dropout_p=0.3, **given).cos().sum(), x, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), (x, weight))

    for ours, plain in zip(second(), second(mask=mask), strict=True):  # a given mask takes the plain path
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_normalization_is_found_for_private_training():
    x, weight = images(1, 4, 5, 5), images(3, 4, 2, 2).requires_grad_()
    found = normalization_of(kn_conv(x, weight, dropout_p=0.0, relu_input=True))
    with fused_kernels(False):
        plain = normalization_of(kn_conv(x, weight, dropout_p=0.0, relu_input=True))
    for ours, theirs in zip(found[:3], plain[:3], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert found[3:] == plain[3:]


# ---- which path is taken


def test_what_has_no_passes_takes_plain_operations(monkeypatch):
    x, weight = images(1, 4, 4, 4), images(2, 4, 2, 2)
    assert find_passes(x, weight) is find_passes(x, weight.contiguous()) is cpu_passes
    assert find_passes(x.contiguous(), weight) is None
    assert find_passes(x.double(), weight.double()) is None
    assert find_passes(x, images(2, 8, 2, 2)[:, ::2]) is None
    assert find_passes(x.as_subclass(type("Other", (torch.Tensor,), {})), weight) is None
    with fused_kernels(False):
        assert find_passes(x, weight) is None
    low, other = torch.ones(2, dtype=torch.bfloat16), torch.ones(2, device="meta")
    for tensor in (low, low.double(), other):  # they would be read as if they were float32 on the CPU
        assert find_passes(x, weight, tensor) is find_passes(x, weight, None, tensor) is None
    monkeypatch.setattr(cpu_passes, "library", lambda: None)
    assert find_passes(x, weight) is None


def test_filters_on_another_device_are_an_error():
    with pytest.raises(RuntimeError, match="device"):
        kn_conv(images(1, 4, 4, 4), images(2, 4, 2, 2).to("meta"))


@pytest.mark.parametrize("learning", [True, False])
@pytest.mark.parametrize("bias", [torch.arange(12.0)[::2], torch.ones(1).expand(6), torch.arange(6.0).double()])
def test_biases_and_residuals_may_lie_and_be_stored_otherwise(bias, learning):
    torch.manual_seed(0)
    x, weight, residual = images(2, 8, 5, 5), images(6, 8, 3, 3), torch.randn(2, 12, 3, 3)[:, ::2].bfloat16()
    with torch.set_grad_enabled(learning):
        for tensors in ((bias, None), (bias, residual), (None, residual.float())):
            ours, exact = (
                kn_conv(x.to(dtype), weight.to(dtype), tensors[0], dropout_p=0.0, residual=tensors[1])
                for dtype in (torch.float32, torch.float64)
            )
            torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_there_are_no_passes(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert library.__wrapped__() is None
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(2, 6, 3, 5), (2, 6, 1, 1), (2, 6, 2, 3, 2), (0, 6, 2, 2), (1, 6, 96, 96)])
def test_single_pixels_are_convolved_by_products(size, bias, monkeypatch):
    x, grad = images(*size), images(size[0], 8, *size[2:])
    weight = torch.randn(8, 6, *[1] * (x.dim() - 2)).contiguous(memory_format=FORMATS[x.dim()])
    plan = Settings(Window.of(x.dim() - 2, 1), 1, 0.0, 1.0, 1e-5, False, False)
    shift = torch.randn(8) if bias else None
    expected = composite.convolve(x, weight, plan, shift)
    gradients = composite.convolution_gradients(grad, x, weight, plan, (True, True, bias), shift)
    monkeypatch.setattr(composite, "convolve", None)
    if x.numel() < 10**4:  # else torch's convolution computes the gradient
        monkeypatch.setattr(composite, "convolution_gradients", None)
    output = cpu_passes.convolve(x, weight, plan, shift)
    assert output.is_contiguous(memory_format=FORMATS[x.dim()])
    torch.testing.assert_close(output, expected)
    found = cpu_passes.convolution_gradients(grad, x, weight, plan, (True, True, bias), shift)
    torch.testing.assert_close(found, gradients, atol=1e-4, rtol=1e-4)
    assert cpu_passes.convolution_gradients(x[:, :1].expand_as(grad), x, weight, plan, (False,) * 3) == (None,) * 3


def test_backward_under_autocast_does_not_round():
    layer = KNConv2d(32, 8, 1, dropout_p=0.0).to(memory_format=torch.channels_last)
    x = images(1, 32, 16, 16).requires_grad_()
    y = layer(x)
    expected = torch.autograd.grad(y.square().sum(), (x, layer.weight), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y.square().sum(), (x, layer.weight))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
