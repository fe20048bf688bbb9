import published
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn import naive
from nn.cases import cases, close_with_gradients
from torch import nn

from knlightning.nn import kernel_norm, kn_conv
from knlightning.nn.functional import check_dropout
from knlightning.nn.statistics import pixel_moments, pixel_moments_by_sums, window_moments
from knlightning.nn.windows import Window


@settings(max_examples=100, deadline=None)
@given(cases())
def test_kn_conv_equals_its_definition(case):
    """With masks that are given and drawn, and paddings, dilations and groups of all kinds."""
    reference = naive.kn_conv(
        case.x, case.weight, case.bias, case.stride, case.pads, case.groups, case.mask, case.p, **case.rest
    )
    ours = kn_conv(*case.arguments(), mask=case.given, **case.rest)
    close_with_gradients(ours, reference, case.tensors())


@settings(max_examples=50, deadline=None)
@given(cases())
def test_kernel_norm_equals_its_definition(case):
    x, kernel = case.x, tuple(case.weight.shape[2:])
    reference = naive.kernel_norm(x, kernel, case.stride, case.pads, case.mask, case.p, **case.rest)
    ours = kernel_norm(x, kernel, case.stride, case.padding, case.p, mask=case.mask, **case.rest)
    close_with_gradients(ours, reference, [x])


@pytest.mark.parametrize("layer", published.VALUES["layers"], ids=lambda layer: f"k{layer['kernel'][0]}")
def test_layers_equal_the_published_ones(layer):
    x = published.images(layer["input"]).requires_grad_()
    weight = published.weights("weight", (layer["out_channels"], layer["input"][1], *layer["kernel"])).requires_grad_()
    bias = published.weights("bias", (layer["out_channels"],))
    geometry = (layer["stride"], layer["padding_lrtb"])
    y = kn_conv(x, weight, bias, *geometry, dropout_p=0.0)
    y.square().sum().backward()
    assert y.sum().item() == pytest.approx(layer["knconv_sum"], rel=1e-10)
    assert y.abs().sum().item() == pytest.approx(layer["knconv_abs_sum"], rel=1e-10)
    assert y.flatten()[:6].tolist() == pytest.approx(layer["knconv_first"], rel=1e-10)
    assert weight.grad.abs().sum().item() == pytest.approx(layer["weight_grad_abs_sum"], rel=1e-10)
    assert x.grad.abs().sum().item() == pytest.approx(layer["input_grad_abs_sum"], rel=1e-10)
    z = kernel_norm(x, layer["kernel"], *geometry, dropout_p=0.0)
    assert list(z.shape) == layer["kernelnorm_shape"]
    assert z.abs().sum().item() == pytest.approx(layer["kernelnorm_abs_sum"], rel=1e-10)
    assert z.flatten()[:6].tolist() == pytest.approx(layer["kernelnorm_first"], rel=1e-6)  # stored from float32


@settings(max_examples=60, deadline=None)
@given(cases(), st.booleans(), st.sampled_from(["none", "relu", "residual", "keep"]))
def test_surrounding_operations_may_be_left_to_the_convolution(case, relu_input, after):
    """ReLU before, ReLU or sum after: the outputs and gradients of the separate operations, from one kept tensor."""
    inputs = case.tensors()
    x, *rest = case.arguments()
    y = kn_conv(x.relu() if relu_input else x, *rest, mask=case.given, **case.rest)
    residual = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape).requires_grad_()
    if after == "residual":
        y, inputs = y + residual, [*inputs, residual]
    y = y.relu() if after == "relu" else y
    torch.manual_seed(5)
    fused = kn_conv(
        x,
        *rest,
        mask=case.given,
        relu_input=relu_input,
        relu_output=after == "relu",
        residual=residual if after == "residual" else None,
        keep_output=after == "keep",
        **case.rest,
    )
    close_with_gradients(fused, y, inputs)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(("padding", "dilation"), [("same", 2), ((1, 2), 1)])
def test_settings_are_those_of_a_convolution(padding_mode, padding, dilation):
    """The closed form from torch's own layers: one with the filters, one that averages windows."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    settings = {"padding": padding, "dilation": dilation, "padding_mode": padding_mode, "dtype": torch.float64}
    conv, average = (nn.Conv2d(3, filters, (2, 3), **settings) for filters in (4, 1))
    nn.init.constant_(average.weight, 1 / 18)
    nn.init.zeros_(average.bias)
    mean = average(x)
    sums, bias = (t.view(-1, 1, 1) for t in (conv.weight.sum((1, 2, 3)), conv.bias))
    expected = (conv(x) - bias - mean * sums) / (average(x.square()) - mean.square() + 1e-5).sqrt() + bias
    del settings["dtype"]
    torch.testing.assert_close(kn_conv(x, conv.weight, conv.bias, dropout_p=0.0, **settings), expected)


def test_copies_in_the_padding_are_dropped_on_their_own():
    x, weight = torch.randn(1, 3, 2, 2), torch.randn(2, 3, 2, 2)
    settings = {"padding": 1, "padding_mode": "circular", "dropout_p": 0.3}
    mask = torch.rand(1, 3, 4, 4) < 0.7
    padded = nn.functional.pad(x, (1, 1, 1, 1), "circular")
    torch.testing.assert_close(
        kn_conv(x, weight, mask=mask, **settings), kn_conv(padded, weight, dropout_p=0.3, mask=mask)
    )
    torch.testing.assert_close(
        kernel_norm(x, 2, mask=mask, **settings), kernel_norm(padded, 2, dropout_p=0.3, mask=mask)
    )
    with pytest.raises(ValueError, match=r"mask must be a bool tensor of shape \(1, 3, 4, 4\)"):
        kn_conv(x, weight, mask=mask[:, :, :2, :2], **settings)


# ---- hard inputs


def reference_of(x, weight, bias, padding=0):
    bias = None if bias is None else bias.double()
    return naive.kn_conv(x.double(), weight.double(), bias, (1, 1), (padding,) * 4)


def test_one_pixel():
    x, weight = torch.randn(2, 5, 1, 1), torch.randn(3, 5, 1, 1)
    torch.testing.assert_close(
        kn_conv(x, weight, dropout_p=0.0), reference_of(x, weight, None).float(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("padding", [0, 1])
def test_mean_far_above_the_spread(padding):
    """The output is as exact as float32 holds the input itself."""
    torch.manual_seed(0)
    x, weight, bias = 1e4 + torch.randn(2, 8, 9, 9), torch.randn(6, 8, 3, 3), torch.randn(6)
    y = kn_conv(x, weight, bias, padding=padding, dropout_p=0.0)
    reference = reference_of(x, weight, bias, padding)
    assert (y - reference).abs().max() < 2e-2 * reference.std()


def test_constant_image_gives_the_bias():
    x, weight, bias = torch.full((2, 3, 6, 6), 0.7, requires_grad=True), torch.randn(4, 3, 3, 3), torch.randn(4)
    y = kn_conv(x, weight, bias, dropout_p=0.0)
    # the rounding of conv(x, W) - mean * sum(W) is divided by sqrt(eps)
    torch.testing.assert_close(y, bias.view(-1, 1, 1).expand_as(y), rtol=0, atol=5e-3)
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert (kernel_norm(x, 3, dropout_p=0.0).abs() < 1e-3).all()


def test_empty_batch():
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((0, 3, 5, 5), (4, 3, 2, 2), (4,)))
    y = kn_conv(x, weight, bias, padding=(1, 0, 1, 0))
    assert y.shape == (0, 4, 5, 5)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any()
    assert not bias.grad.any()
    assert kernel_norm(x, 2).shape == (0, 3, 8, 8)


# ---- dropout and the statistics of evaluation


def test_clean_and_expected_evaluation_is_deterministic_and_sampled_is_not():
    x, weight = torch.randn(2, 16, 6, 6), torch.randn(4, 16, 2, 2)
    results = {}
    for mode, same in (("clean", True), ("expected", True), ("sampled", False)):
        one, two = (kn_conv(x, weight, dropout_p=0.3, training=False, eval_statistics=mode) for _ in range(2))
        assert torch.equal(one, two) == same, mode
        results[mode] = one
    assert torch.equal(results["expected"], kn_conv(x, weight, dropout_p=0.3, training=False))
    assert torch.equal(results["clean"], kn_conv(x, weight, dropout_p=0.0))


def test_masks_follow_the_seed_and_differ_from_call_to_call():
    x, weight = torch.randn(2, 16, 6, 6), torch.randn(4, 16, 2, 2)
    torch.manual_seed(7)
    one, two = kn_conv(x, weight, dropout_p=0.3), kn_conv(x, weight, dropout_p=0.3)
    torch.manual_seed(7)
    assert torch.equal(one, kn_conv(x, weight, dropout_p=0.3))
    assert not torch.equal(one, two)


# ---- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_convolves_low_and_keeps_statistics_in_float32(dtype):
    torch.manual_seed(0)
    x = (torch.randn(2, 32, 8, 8) + 20).requires_grad_()
    weight = torch.randn(8, 32, 3, 3, requires_grad=True)
    weight.data -= weight.data.mean((1, 2, 3), keepdim=True)
    bias = torch.randn(8, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = kn_conv(x, weight, bias, dropout_p=0.0)
    assert y.dtype == dtype
    low = x.to(dtype)
    window = Window.of(2, 3)
    mean, var = window_moments(*pixel_moments_by_sums(low, None, 0.0), window)
    assert mean.dtype == var.dtype == torch.float32
    exact_mean, exact_var = window_moments(*pixel_moments(low.double(), None, 0.0), window)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=2e-4, atol=0)  # 2^-24 * mean^2 / var, several times
    y.float().square().sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (low, weight.to(dtype), bias)]
    reference = naive.kn_conv(*exact, (1, 1), (0,) * 4)
    reference.square().sum().backward()
    precision = torch.finfo(dtype).eps
    assert (y - reference).abs().max() < 20 * precision * reference.abs().max()
    for ours, theirs in zip((x, weight, bias), exact, strict=True):
        assert ours.grad.dtype == torch.float32
        assert (ours.grad - theirs.grad).norm() < 20 * precision * theirs.grad.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_plain_backgrounds_in_low_precision(training, dtype):
    """Where the windows are constant, nothing that low precision rounds is multiplied by 1 / sqrt(eps) = 316."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 9, 12)
    x[..., :7] = 1.7
    x = x.to(dtype)
    weight, direction = torch.randn(6, 8, 3, 3), torch.randn(2, 6, 9, 12)

    def output_and_gradient(x, weight, autocast):
        x.requires_grad_()
        with torch.autocast("cpu", dtype, enabled=autocast):
            y = kn_conv(x, weight, padding=1, dropout_p=0.0 if training else 0.05, training=training)
        return y.double(), torch.autograd.grad(y, x, direction.to(y.dtype))[0].double()

    found = output_and_gradient(x.float(), weight, True)
    for ours, exact in zip(found, output_and_gradient(x.double(), weight.double(), False), strict=True):
        assert (ours - exact).norm() < 2 * torch.finfo(dtype).eps * exact.norm()


# ---- wrong arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout_p": 1.0}, "^dropout_p must be a number at least 0 and below 1, got 1.0$"),
        ({"dropout_p": -0.1}, "^dropout_p must be .*, got -0.1$"),
        ({"eval_statistics": "mean"}, "^eval_statistics must be one of clean, expected, sampled, got 'mean'$"),
        ({"weight": torch.randn(4, 4, 7, 2)}, r"^kernel_size must be small enough .*, got \(7, 2\)"),
        ({"groups": 3}, r"^weight's shape must be .* C = 4 .*, got \(4, 4, 2, 2\). The number of groups is 3$"),
        ({"groups": 0}, "The number of groups is 0$"),
        ({"input": torch.randn(1, 3, 5, 5)}, "^weight's shape must be .* C = 3 input channels"),
        ({"input": torch.randn(4, 5, 5)}, r"^input must be .*\(4, 5, 5\)"),
        ({"stride": 0}, "^stride must be .*, got 0$"),
        ({"padding_mode": "constant"}, "^padding_mode must be one of .*, got 'constant'$"),
        (
            {"residual": torch.ones(1, 4, 1, 1)},
            r"^residual's shape must be that of the output, \(1, 4, 4, 4\), got \(1, 4, 1, 1\)$",
        ),
        ({"relu_output": True, "residual": torch.ones(1, 4, 4, 4)}, "^relu_output must be False with a residual"),
        ({"bias": torch.ones(3)}, r"^bias's shape must be \(4,\), a number for each filter, got \(3,\)$"),
        ({"mask": torch.ones(1, 4, 5, 5)}, "^mask must be a bool tensor"),
        ({"mask": torch.ones(1, 4, 5, 4, dtype=torch.bool)}, r"^mask must be .*\(1, 4, 5, 4\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        kn_conv(**{"input": torch.randn(1, 4, 5, 5), "weight": torch.randn(4, 4, 2, 2)} | change)


def test_whole_numbers_are_not_normalized():
    for x in (torch.ones(1, 4, 5, 5, dtype=torch.int64), torch.ones(4, 5, 5, dtype=torch.int64)):
        with pytest.raises(TypeError, match=r"input must be a floating point tensor, got torch\.int64"):
            kn_conv(x, torch.randn(4, 4, 2, 2))
        with pytest.raises(TypeError, match="floating point tensor"):
            kernel_norm(x, 2)


def test_dropout_is_checked_by_itself():
    check_dropout(0.0, "sampled")
    with pytest.raises(ValueError, match="dropout_p must be"):
        check_dropout(1.0, "clean")
