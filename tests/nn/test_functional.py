import itertools
import math
from dataclasses import dataclass

import published
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nn import naive
from torch import Tensor

from knlightning.nn import functional, kernel_norm, kn_conv
from knlightning.nn.functional import EvalStatistics, normalization_of
from knlightning.nn.statistics import (
    draw_dropped,
    draw_mask,
    in_memory_order,
    mask_of,
    pixel_moments,
    pixel_moments_by_sums,
    pixels_of,
    window_moments,
)


@dataclass
class Case:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    pads: tuple[int, ...]
    groups: int
    mask: Tensor | None
    p: float


@st.composite
def cases(draw: st.DrawFn) -> Case:
    spatial = draw(st.integers(1, 3))
    number = st.integers(1, 3 if spatial < 3 else 2)
    kernel = draw(st.tuples(*[number] * spatial))
    stride = draw(st.tuples(*[st.integers(1, 3)] * spatial))
    if spatial == 2 and draw(st.booleans()):
        padding = draw(st.tuples(*[st.integers(0, 2)] * 4))
        pads = padding
    else:
        padding = draw(st.tuples(*[st.integers(0, 2)] * spatial))
        pads = tuple(p for size in reversed(padding) for p in (size, size))
    size = [k + draw(st.integers(0, 3)) for k in kernel]
    groups = draw(st.integers(1, 3))
    channels, filters = (groups * draw(st.integers(1, 2)) for _ in range(2))
    # A unit of one element has no variance: 1 / sqrt(eps) magnifies the rounding of the reference itself.
    assume(channels * math.prod(kernel) > 1)
    batch = draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    p = draw(st.sampled_from([0.0, 0.05, 0.5]))
    x = randn(batch, channels, *size) * draw(st.sampled_from([0.1, 1.0, 30.0])) + draw(st.sampled_from([0.0, 5.0]))
    return Case(
        x=x,
        weight=randn(filters, channels // groups, *kernel),
        bias=randn(filters) if draw(st.booleans()) else None,
        stride=stride,
        padding=padding,
        pads=pads,
        groups=groups,
        mask=torch.rand(x.shape, generator=generator) >= p if p else None,
        p=p,
    )


def window_statistics(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    pads: tuple[int, ...],
    mask: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    return window_moments(*pixel_moments(x, mask, p), kernel, stride, pads)


def close(ours: Tensor, reference: Tensor) -> None:
    scale = reference.abs().max().clamp(min=1.0) if reference.numel() else 1.0
    torch.testing.assert_close(ours / scale, reference / scale, rtol=0, atol=1e-10)


def gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    direction = torch.cos(torch.arange(output.numel(), dtype=output.dtype)).reshape(output.shape)
    return torch.autograd.grad((output * direction).sum(), inputs)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_kn_conv_equals_its_definition(case: Case) -> None:
    inputs = [t.requires_grad_() for t in (case.x, case.weight, case.bias) if t is not None]
    reference = naive.kn_conv(case.x, case.weight, case.bias, case.stride, case.pads, case.groups, case.mask, case.p)
    ours = kn_conv(
        case.x, case.weight, case.bias, case.stride, case.padding, case.groups, case.p, mask=case.mask
    )  # fmt: skip
    close(ours, reference)
    for a, b in zip(gradients(ours, inputs), gradients(reference, inputs), strict=True):
        close(a, b)


@settings(max_examples=200, deadline=None)
@given(cases(), st.booleans())
def test_kn_conv_with_a_drawn_mask_equals_its_definition(case: Case, channels_last: bool) -> None:
    if channels_last and case.x.dim() == 4:
        case.x = case.x.to(memory_format=torch.channels_last)
    if case.p == 0 or case.x.numel() == 0:
        case.mask = None
    else:
        torch.manual_seed(5)
        case.mask = mask_of(draw_dropped(case.x.numel(), case.p), case.x)
    inputs = [t.requires_grad_() for t in (case.x, case.weight, case.bias) if t is not None]
    reference = naive.kn_conv(case.x, case.weight, case.bias, case.stride, case.pads, case.groups, case.mask, case.p)
    torch.manual_seed(5)
    ours = kn_conv(case.x, case.weight, case.bias, case.stride, case.padding, case.groups, case.p)
    close(ours, reference)
    for a, b in zip(gradients(ours, inputs), gradients(reference, inputs), strict=True):
        close(a, b)


@pytest.mark.parametrize("relu_input", [True, False])
@pytest.mark.parametrize("padding", [0, 1, (1, 0, 1, 0)])
@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("input_format", [torch.contiguous_format, torch.channels_last])
def test_positions_of_dropped_elements_hold_whatever_format_the_gradient_comes_in(
    input_format: torch.memory_format, weight_format: torch.memory_format, padding: int, relu_input: bool
) -> None:
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
def test_the_gradient_of_a_large_batch_is_taken_by_slices(
    memory_format: torch.memory_format, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 4, 6, 5, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    weight, bias = torch.randn(6, 4, 2, 2, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    inputs = [x, weight.requires_grad_(), bias.requires_grad_(), torch.randn(7, 6, 5, 4, dtype=torch.float64)]
    mask = torch.rand(x.shape) < 0.7 if which == "given" else None

    def all_gradients() -> list[torch.Tensor]:
        torch.manual_seed(1)
        p = 0.0 if which == "none" else 0.3
        output = kn_conv(x, weight, bias, dropout_p=p, mask=mask, relu_input=True, residual=inputs[3].requires_grad_())
        return gradients(output, inputs)

    whole = all_gradients()
    monkeypatch.setattr(functional, "_LARGE", 3 * 6 * 5 * 4 * 8)  # three samples
    calls = []
    one = functional._gradients
    monkeypatch.setattr(functional, "_gradients", lambda part, *args: calls.append(part) or one(part, *args))
    for a, b in zip(all_gradients(), whole, strict=True):
        close(a, b)
    assert calls == [slice(0, 3), slice(3, 6), slice(6, 9)]


def test_backward_under_autocast_keeps_the_statistics_exact() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    output = kn_conv(x, torch.randn(8, 8, 3, 3), dropout_p=0.0)
    grad = torch.randn(output.shape)
    (outside,) = torch.autograd.grad(output, x, grad, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (inside,) = torch.autograd.grad(output, x, grad)
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_given_mask_and_a_drawn_one_agree_in_low_precision(dtype: torch.dtype) -> None:
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


@settings(max_examples=100, deadline=None)
@given(cases())
def test_kernel_norm_equals_its_definition(case: Case) -> None:
    x = case.x.requires_grad_()
    kernel = tuple(case.weight.shape[2:])
    reference = naive.kernel_norm(x, kernel, case.stride, case.pads, case.mask, case.p)
    ours = kernel_norm(x, kernel, case.stride, case.padding, case.p, mask=case.mask)
    close(ours, reference)
    close(gradients(ours, [x])[0], gradients(reference, [x])[0])


@settings(max_examples=50, deadline=None)
@given(cases())
def test_compilers_and_transforms_get_the_gradient_of_the_closed_form(case: Case) -> None:
    """`torch.func` takes the composite operations; their gradient is the closed form's."""

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        y = kn_conv(x, weight, case.bias, case.stride, case.padding, case.groups, case.p, mask=case.mask)
        return y.square().sum()

    x, weight = case.x.requires_grad_(), case.weight.requires_grad_()
    closed = torch.autograd.grad(loss(x, weight), (x, weight))
    composite = torch.func.grad(loss, argnums=(0, 1))(x.detach(), weight.detach())
    for a, b in zip(closed, composite, strict=True):
        close(a, b.detach())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("eval_statistics", ["clean", "expected", "sampled"])
@pytest.mark.parametrize("padding", [1, (1, 0, 2, 0)])
def test_first_and_second_derivatives(training: bool, eval_statistics: EvalStatistics, padding: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    mask = None if eval_statistics == "expected" and not training else torch.rand(x.shape) > 0.3

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return kn_conv(x, weight, bias, (1, 2), padding, 2, 0.3, training, eval_statistics, mask=mask)

    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))


@pytest.mark.parametrize("needed", [n for n in itertools.product([True, False], repeat=3) if any(n)])
def test_only_the_gradients_asked_for_are_computed(needed: tuple[bool, bool, bool]) -> None:
    torch.manual_seed(0)
    full = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4, 4), (5, 3, 2, 2), (5,))]
    reference = gradients(kn_conv(*full, dropout_p=0.0), full)
    some = [t.detach().clone().requires_grad_(n) for t, n in zip(full, needed, strict=True)]
    kn_conv(*some, dropout_p=0.0).backward(torch.cos(torch.arange(2 * 5 * 9.0).double()).reshape(2, 5, 3, 3))
    for tensor, expected, n in zip(some, reference, needed, strict=True):
        assert (tensor.grad is not None) == n
        if n:
            close(tensor.grad, expected)


@pytest.mark.parametrize("layer", published.VALUES["layers"], ids=lambda layer: f"k{layer['kernel'][0]}")
def test_layers_equal_the_published_ones(layer: dict) -> None:
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


@settings(max_examples=100, deadline=None)
@given(cases(), st.booleans(), st.sampled_from(["none", "relu", "residual", "keep"]), st.booleans())
def test_surrounding_operations_may_be_left_to_the_convolution(
    case: Case, relu_input: bool, after: str, given_mask: bool
) -> None:
    """ReLU before, ReLU or sum after: the outputs and gradients of the separate operations, from one kept tensor."""
    geometry = (case.stride, case.padding, case.groups, case.p)
    mask = case.mask if given_mask else None
    inputs = [t.requires_grad_() for t in (case.x, case.weight, case.bias) if t is not None]
    torch.manual_seed(1)
    y = kn_conv(case.x.relu() if relu_input else case.x, case.weight, case.bias, *geometry, mask=mask)
    residual = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape).requires_grad_()
    if after == "residual":
        y, inputs = y + residual, [*inputs, residual]
    y = y.relu() if after == "relu" else y
    torch.manual_seed(1)
    fused = kn_conv(
        case.x,
        case.weight,
        case.bias,
        *geometry,
        mask=mask,
        relu_input=relu_input,
        relu_output=after == "relu",
        residual=residual if after == "residual" else None,
        keep_output=after == "keep",
    )
    close(fused, y)
    for a, b in zip(gradients(fused, inputs), gradients(y, inputs), strict=True):
        close(a, b)


@pytest.mark.parametrize("relu_output", [True, False])
def test_second_derivatives_with_the_surrounding_operations(relu_output: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias, residual = (
        torch.randn(s, dtype=torch.float64, requires_grad=True)
        for s in ((2, 3, 4, 4), (2, 3, 2, 2), (2,), (2, 2, 3, 3))
    )
    mask = torch.rand(x.shape) > 0.3

    def function(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        added = None if relu_output else residual
        return kn_conv(
            x, weight, bias, dropout_p=0.3, mask=mask, relu_input=True, relu_output=relu_output, residual=added
        ) + (residual if relu_output else 0)

    assert torch.autograd.gradcheck(function, (x, weight, bias, residual))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias, residual))


def test_a_kept_output_may_not_be_changed_in_place() -> None:
    x, weight = torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 2, 2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kn_conv(x, weight, keep_output=True).mul_(2).sum().backward()


# ---- hard inputs


def reference_of(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 0) -> Tensor:
    bias = None if bias is None else bias.double()
    return naive.kn_conv(x.double(), weight.double(), bias, (1, 1), (padding,) * 4)


def test_one_pixel() -> None:
    x, weight = torch.randn(2, 5, 1, 1), torch.randn(3, 5, 1, 1)
    torch.testing.assert_close(
        kn_conv(x, weight, dropout_p=0.0), reference_of(x, weight, None).float(), rtol=1e-4, atol=1e-4
    )


def test_constant_image_gives_the_bias() -> None:
    x, weight, bias = torch.full((2, 3, 6, 6), 0.7, requires_grad=True), torch.randn(4, 3, 3, 3), torch.randn(4)
    y = kn_conv(x, weight, bias, dropout_p=0.0)
    # the rounding of conv(x, W) - mean * sum(W) is divided by sqrt(eps)
    torch.testing.assert_close(y, bias.view(-1, 1, 1).expand_as(y), rtol=0, atol=5e-3)
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert (kernel_norm(x, 3, dropout_p=0.0).abs() < 1e-3).all()


@pytest.mark.parametrize("padding", [0, 1])
def test_mean_far_above_the_spread(padding: int) -> None:
    """Variance and output are as exact as float32 holds the input itself."""
    torch.manual_seed(0)
    spread = torch.randn(2, 8, 9, 9)
    x, weight, bias = 1e4 + spread, torch.randn(6, 8, 3, 3), torch.randn(6)
    mean, var = window_moments(*pixel_moments_by_sums(x, None, 0.0), (3, 3), (1, 1), (padding,) * 4)
    cut = naive.windows(x.double(), (3, 3), (1, 1), (padding,) * 4, None, 0.0)
    for (i, j), (unit, _) in cut.items():
        exact = unit.flatten(1).var(1, correction=0)
        # float32 holds a pixel's mean to 1e4 * 2^-24 = 6e-4, beside a spread of 1
        torch.testing.assert_close(var[:, 0, i, j].double(), exact, rtol=1e-3, atol=0)
        torch.testing.assert_close(mean[:, 0, i, j].double(), unit.flatten(1).mean(1), rtol=2e-7, atol=0)
    y = kn_conv(x, weight, bias, padding=padding, dropout_p=0.0)
    reference = reference_of(x, weight, bias, padding)
    assert (y - reference).abs().max() < 2e-2 * reference.std()


def test_both_halves_of_an_image_far_apart() -> None:
    """No single shift centres this image; every window has to be centred by itself."""
    x = torch.randn(1, 8, 4, 12)
    x[..., :6] += 1e4
    x[..., 6:] -= 1e4
    _, var = window_moments(*pixel_moments_by_sums(x, None, 0.0), (2, 2), (1, 1), (0,) * 4)
    for (i, j), (unit, _) in naive.windows(x.double(), (2, 2), (1, 1), (0,) * 4, None, 0.0).items():
        torch.testing.assert_close(var[:, 0, i, j].double(), unit.flatten(1).var(1, correction=0), rtol=1e-3, atol=0)


def test_empty_batch() -> None:
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((0, 3, 5, 5), (4, 3, 2, 2), (4,)))
    y = kn_conv(x, weight, bias, padding=(1, 0, 1, 0))
    assert y.shape == (0, 4, 5, 5)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any()
    assert not bias.grad.any()
    assert kernel_norm(x, 2).shape == (0, 3, 8, 8)


# ---- dropout and the statistics of evaluation


def test_expected_statistics_average_those_of_all_masks() -> None:
    p = 0.3
    x = torch.randn(1, 2, 2, 2, dtype=torch.float64)
    mean, second = torch.zeros(()), torch.zeros(())
    for kept in itertools.product([True, False], repeat=8):
        m, v = window_statistics(x, (2, 2), (1, 1), (0,) * 4, torch.tensor(kept).reshape(x.shape), p)
        weight = math.prod(1 - p if k else p for k in kept)
        mean, second = mean + weight * m, second + weight * v
    expected = (x - mean) / torch.sqrt(second + 1e-5)
    torch.testing.assert_close(kernel_norm(x, 2, dropout_p=p, training=False, eval_statistics="expected"), expected)


def test_clean_and_expected_evaluation_is_deterministic_and_sampled_is_not() -> None:
    x, weight = torch.randn(2, 16, 6, 6), torch.randn(4, 16, 2, 2)
    for mode, same in (("clean", True), ("expected", True), ("sampled", False)):
        one, two = (kn_conv(x, weight, dropout_p=0.3, training=False, eval_statistics=mode) for _ in range(2))
        assert torch.equal(one, two) == same, mode
    clean = kn_conv(x, weight, dropout_p=0.3, training=False)
    assert torch.equal(clean, kn_conv(x, weight, dropout_p=0.0))


@pytest.mark.parametrize("by_gaps", [True, False])
@pytest.mark.parametrize("p", [0.05, 0.25, 0.9])
def test_drawn_masks_are_independent_bernoulli(by_gaps: bool, p: float) -> None:
    """Counts, and pairs of neighbours in every direction, against their binomial distributions at 5 sigma."""
    shape = (20, 30, 40, 41)
    torch.manual_seed(3)
    like = torch.empty(shape)
    n = like.numel()
    dropped = ~(mask_of(draw_dropped(n, p), like) if by_gaps else draw_mask(like, p))
    assert abs(dropped.sum().item() - n * p) < 5 * math.sqrt(n * p * (1 - p))
    for dim in range(4):
        size = shape[dim]
        pairs = dropped.narrow(dim, 1, size - 1) & dropped.narrow(dim, 0, size - 1)
        # overlapping pairs are correlated: var = n p^2 (1 - p^2) + 2 n p^3 (1 - p)
        deviation = math.sqrt(pairs.numel() * p * p * (1 - p * p + 2 * p * (1 - p)))
        assert abs(pairs.sum().item() - pairs.numel() * p * p) < 5 * deviation
    each = dropped.flatten(1).sum(1).double()  # by image
    spread = n / 20 * p * (1 - p)
    assert ((each - n / 20 * p).square() / spread).sum() < 20 + 5 * math.sqrt(2 * 20)


def test_first_and_last_element_are_dropped_as_often_as_any() -> None:
    torch.manual_seed(0)
    draws = torch.stack([mask_of(draw_dropped(5, 0.3), torch.empty(5)) for _ in range(4000)])
    assert ((draws.double().mean(0) - 0.7).abs() < 5 * math.sqrt(0.21 / 4000)).all()


@pytest.mark.parametrize("count", [0, 1, 7, 10_000])
def test_dropped_positions_ascend_within_the_tensor(count: int) -> None:
    for p in (1e-9, 0.05, 0.999):
        dropped = draw_dropped(count, p)
        assert (dropped.diff() > 0).all()
        assert ((dropped >= 0) & (dropped < count)).all()


def test_more_gaps_are_drawn_when_the_first_do_not_reach_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math, "sqrt", lambda _: -20.0)  # so that too few are drawn at first
    torch.manual_seed(0)
    dropped = draw_dropped(100_000, 0.05)
    monkeypatch.undo()
    assert abs(len(dropped) - 5000) < 5 * math.sqrt(5000)
    assert dropped[-1] > 99_000


@pytest.mark.parametrize("channels_last", [True, False])
def test_pixels_of_positions(channels_last: bool) -> None:
    x = torch.zeros(2, 3, 4, 5)
    pixels = torch.arange(2 * 4 * 5).reshape(2, 1, 4, 5).expand_as(x)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    ordered = in_memory_order(torch.empty_like(x, dtype=torch.int64).copy_(pixels))
    assert torch.equal(pixels_of(torch.arange(x.numel()), x), ordered)


def test_sums_and_two_passes_agree_and_cancellation_is_mended() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 5, 5)
    x[0, :, 2] += 1e4  # one row of pixels far from zero
    x[1, :, 3, 3] = 7.0  # one constant pixel
    torch.testing.assert_close(pixel_moments_by_sums(x, None, 0.0), pixel_moments(x, None, 0.0), rtol=1e-5, atol=1e-6)
    assert pixel_moments_by_sums(x, None, 0.0)[1][1, 0, 3, 3] == 0
    dropped = draw_dropped(x.numel(), 0.3)
    ours, reference = pixel_moments_by_sums(x, dropped, 0.3), pixel_moments(x, mask_of(dropped, x), 0.3)
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)


def test_masks_follow_the_seed_and_differ_from_call_to_call() -> None:
    x, weight = torch.randn(2, 16, 6, 6), torch.randn(4, 16, 2, 2)
    torch.manual_seed(7)
    one, two = kn_conv(x, weight, dropout_p=0.3), kn_conv(x, weight, dropout_p=0.3)
    torch.manual_seed(7)
    assert torch.equal(one, kn_conv(x, weight, dropout_p=0.3))
    assert not torch.equal(one, two)


# ---- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_convolves_low_and_keeps_statistics_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(2, 32, 8, 8) + 20).requires_grad_()
    weight = torch.randn(8, 32, 3, 3, requires_grad=True)
    weight.data -= weight.data.mean((1, 2, 3), keepdim=True)
    bias = torch.randn(8, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = kn_conv(x, weight, bias, dropout_p=0.0)
    assert y.dtype == dtype
    low = x.to(dtype)
    mean, var = window_moments(*pixel_moments_by_sums(low, None, 0.0), (3, 3), (1, 1), (0,) * 4)
    assert mean.dtype == var.dtype == torch.float32
    exact_mean, exact_var = window_statistics(low.double(), (3, 3), (1, 1), (0,) * 4)
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


# ---- wrong arguments


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\), got -0.1"),
        ({"eval_statistics": "mean"}, ValueError, "one of clean, expected, sampled, got 'mean'"),
        (
            {"weight": torch.randn(4, 4, 7, 2)},
            ValueError,
            r"kernel of size 7 is larger .* dimension 0: 0 \+ 5 \+ 0 = 5",
        ),
        ({"groups": 3}, ValueError, "12 input channels"),
        ({"groups": 0}, ValueError, "groups=0"),
        ({"input": torch.ones(1, 4, 5, 5, dtype=torch.int64)}, TypeError, "floating point tensor, got torch.int64"),
        ({"input": torch.randn(4, 5, 5)}, ValueError, r"\[N, C, \*spatial\].*\(4, 5, 5\)"),
        ({"input": torch.randn(1, 3, 5, 5)}, ValueError, "4 input channels.*got 3"),
        ({"stride": 0}, ValueError, "stride must be an integer of at least 1.*got 0"),
        ({"padding": (1, 2, 3)}, ValueError, r"padding must be .*left, right, top, bottom.*"),
        ({"padding": -1}, ValueError, "padding must be an integer of at least 0.*got -1"),
        ({"residual": torch.ones(1, 4, 1, 1)}, ValueError, r"residual must have the output's shape \(1, 4, 4, 4\)"),
        ({"relu_output": True, "residual": torch.ones(1, 4, 4, 4)}, ValueError, "relu_output and residual exclude"),
        ({"mask": torch.ones(1, 4, 5, 5)}, ValueError, "mask must be a bool tensor"),
        ({"mask": torch.ones(1, 4, 5, 4, dtype=torch.bool)}, ValueError, r"mask must be .*\(1, 4, 5, 4\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"input": torch.randn(1, 4, 5, 5), "weight": torch.randn(4, 4, 2, 2), **change}
    with pytest.raises(error, match=message):
        kn_conv(**arguments)


def test_normalization_of_an_output() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 5, 6, dtype=torch.float64), torch.randn(4, 3, 2, 2, dtype=torch.float64)
    mask = torch.rand(x.shape) > 0.2
    output = kn_conv(
        x.requires_grad_(), weight, None, 2, (1, 0, 2, 0), 1, 0.2, eps=0.1, mask=mask, relu_input=True, relu_output=True
    )
    found = normalization_of(output)
    units = torch.nn.functional.pad(x.relu() * mask / 0.8, (1, 0, 2, 0)).unfold(2, 2, 2).unfold(3, 2, 2)
    var, mean = torch.var_mean(units, (1, 4, 5), correction=0)
    torch.testing.assert_close(found.mean, mean.unsqueeze(1))
    torch.testing.assert_close(found.rstd, (var + 0.1).rsqrt().unsqueeze(1))
    assert found.input.data_ptr() == x.data_ptr()
    assert found[3:] == ((1, 0, 2, 0), True, True)


def test_only_outputs_with_a_gradient_have_a_normalization() -> None:
    x, weight = torch.rand(1, 2, 3, 3), torch.rand(2, 2, 2, 2, requires_grad=True)
    with pytest.raises(ValueError, match="only while its gradient is wanted, got a tensor made by MulBackward0"):
        normalization_of(kn_conv(x, weight) * 2)
    with torch.no_grad(), pytest.raises(ValueError, match="got a tensor made by no operation"):
        normalization_of(kn_conv(x, weight))
