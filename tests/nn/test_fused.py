"""The fused kernels, in Triton's interpreter on a CPU."""

import pytest
import torch
from hypothesis import given, settings
from nn import naive
from nn.cases import cases, compare, gradients
from torch import nn
from torch.utils.checkpoint import checkpoint

from knlightning.nn import KNConv2d, fused, fused_kernels, fused_passes, kn_conv
from knlightning.nn.functional import normalization_of
from knlightning.nn.fused import draw_seed
from knlightning.nn.fused_passes import mask_of_seed

LAST = torch.channels_last


@pytest.fixture(autouse=True)
def _fused(monkeypatch):
    monkeypatch.setattr(fused_passes, "_PROGRAMS", 1)  # large blocks: a program takes the interpreter some 20 ms
    with fused_kernels(True):
        yield


def drawn_mask(input, p):
    """The mask that a call after `torch.manual_seed(5)` draws."""
    torch.manual_seed(5)
    return mask_of_seed(draw_seed(input.device), input, p)


def is_fused(output):
    return output.grad_fn.name() == "_EagerBackward"


# ---- the definition


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(cases())
def test_cases_of_all_kinds_equal_the_definition(case):
    case.rest["eps"] = 1.0  # 1 / sqrt(eps) magnifies the rounding of float32 in windows that are nearly constant
    case.x = 3 * case.x.detach() / case.x.abs().max() if case.x.numel() else case.x
    inputs = [t.detach().float().requires_grad_() for t in case.tensors()]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    (x, weight, *rest), (input, filters, *bias) = exact, inputs
    mode = case.rest["padding_mode"]
    padded = input if mode == "zeros" or not any(case.pads) else nn.functional.pad(input, case.pads, mode)
    mask = drawn_mask(padded.detach(), case.p) if case.p else None
    reference = naive.kn_conv(
        x, weight, rest[0] if rest else None, case.stride, case.pads, case.groups, mask, case.p, **case.rest
    )
    settings = (bias[0] if bias else None, case.stride, case.padding, case.groups, case.p)
    torch.manual_seed(5)
    ours = kn_conv(input, filters, *settings, **case.rest)
    assert is_fused(ours)
    compare(ours, inputs, reference, exact, 1e-4)


@pytest.mark.parametrize(
    ("memory_format", "dtype", "tolerance", "relu_input", "after", "statistics"),
    [
        (LAST, torch.float32, 1e-6, True, "residual", "trained"),
        (torch.contiguous_format, torch.float32, 1e-6, False, "relu", "trained"),
        (LAST, torch.float32, 1e-6, True, "", "trained"),
        (torch.contiguous_format, torch.float32, 1e-6, True, "keep", "expected"),
        (LAST, torch.float32, 1e-6, False, "relu", "clean"),
        (LAST, torch.bfloat16, 2e-2, True, "residual", "trained"),
        (LAST, torch.float16, 2e-3, True, "relu", "trained"),
    ],
)
def test_the_operations_around_the_convolution(memory_format, dtype, tolerance, relu_input, after, statistics):
    """With all of them, more channels than a tile has, and a stride and padding that differ from side to side."""
    torch.manual_seed(0)
    x = (torch.randn(1, 130, 5, 7) + 0.3).to(dtype).contiguous(memory_format=memory_format)
    weight, bias = (torch.randn(6, 130, 2, 3) / 30).to(dtype), torch.randn(6)
    p, window = 0.3, {"stride": (1, 2), "padding": (2, 1, 1, 0)}
    training, statistics = statistics == "trained", "clean" if statistics == "trained" else statistics
    mask = drawn_mask(x, p) if training else None
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    around = {"relu_input": relu_input, "relu_output": after == "relu", "keep_output": after == "keep"}
    if after == "residual":
        around["residual"] = torch.randn(1, 6, 5, 4).to(dtype).requires_grad_()
        inputs.append(around["residual"])
    exact = [t.detach().double().requires_grad_() for t in inputs]
    settings = {"dropout_p": p, "training": training, "eval_statistics": statistics, **window}
    torch.manual_seed(5)
    ours = kn_conv(*inputs[:3], **settings, **around)
    assert is_fused(ours)
    reference = around | ({"residual": exact[3]} if after == "residual" else {})
    with fused_kernels(False):
        expected = kn_conv(*exact[:3], mask=mask, **settings, **reference)
    compare(ours, inputs, expected, exact, tolerance)
    assert ours.is_contiguous(memory_format=memory_format)


def test_empty_batch():
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((0, 3, 5, 5), (4, 3, 2, 2), (4,)))
    y = kn_conv(x, weight, bias, padding=(1, 0, 1, 0))
    assert is_fused(y)
    assert y.shape == (0, 4, 5, 5)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any()
    assert not bias.grad.any()


def test_what_is_not_a_number_stays_so():
    x, weight = torch.randn(1, 4, 3, 3), torch.randn(2, 4, 1, 1)
    x[0, 1, 1, 1] = float("nan")
    y = kn_conv(x, weight, relu_input=True, relu_output=True)
    assert y.isnan().sum() == 2


def test_compilers_may_hand_the_operator_a_view():
    operator, seed = torch.ops.knlightning.kn_conv.default, torch.tensor([3])
    numbers = (True, [1, 1], [0, 0, 0, 0], [1, 1], 1, 0.3, 1.0, 1e-5, False, False)
    x, weight = torch.randn(1, 4, 5, 9)[..., ::2], torch.randn(2, 4, 2, 2)
    view, dense = (operator(t, weight, None, None, seed, *numbers)[0] for t in (x, x.contiguous()))
    assert torch.equal(view, dense)


# ---- gradients


def test_only_the_gradients_asked_for_are_computed():
    full = [torch.randn(s, requires_grad=True) for s in ((1, 3, 4, 4), (5, 3, 2, 2), (5,))]
    reference = gradients(kn_conv(*full, dropout_p=0.0), full)
    for needed in ((True, False, False), (False, True, True)):
        some = [t.detach().clone().requires_grad_(n) for t, n in zip(full, needed, strict=True)]
        found = gradients(kn_conv(*some, dropout_p=0.0), [t for t in some if t.requires_grad])
        expected = [g for g, n in zip(reference, needed, strict=True) if n]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_second_derivatives_are_those_of_the_plain_path():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 3, 3, 4, requires_grad=True), torch.randn(2, 3, 2, 2, requires_grad=True)
    mask = drawn_mask(x.detach(), 0.3)

    def second(**given):
        torch.manual_seed(5)
        first = torch.autograd.grad(kn_conv(x, weight, dropout_p=0.3, **given).cos().sum(), x, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), (x, weight))

    for ours, plain in zip(second(), second(mask=mask), strict=True):  # a given mask takes the plain path
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_checkpointing_draws_the_same_mask_again():
    layer = KNConv2d(4, 6, 2, dropout_p=0.3)
    x = torch.randn(1, 4, 4, 4, requires_grad=True)
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(0)
        found.append(torch.autograd.grad(run(x).square().sum(), (x, *layer.parameters())))
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


def test_normalization_is_found_for_private_training():
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(3, 4, 2, 2, requires_grad=True)
    found = normalization_of(kn_conv(x, weight, dropout_p=0.0, relu_input=True))
    with fused_kernels(False):
        plain = normalization_of(kn_conv(x, weight, dropout_p=0.0, relu_input=True))
    for ours, theirs in zip(found[:3], plain[:3], strict=True):
        torch.testing.assert_close(ours, theirs)
        assert not ours.requires_grad
    assert found[3:] == plain[3:]


def test_the_output_may_be_changed_in_place_unless_it_is_kept():
    x, weight = torch.randn(1, 3, 4, 4, requires_grad=True), torch.randn(4, 3, 2, 2)
    grads = [
        torch.autograd.grad(relu(kn_conv(x, weight, dropout_p=0.0)).square().sum(), x)[0]
        for relu in (torch.relu, torch.relu_)
    ]
    assert torch.equal(*grads)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kn_conv(x, weight, keep_output=True).mul_(2).sum().backward()


# ---- which path is taken


def test_autocast_takes_the_kernels_in_low_precision():
    layer, x = KNConv2d(4, 6, 2, dropout_p=0.0), torch.randn(1, 4, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert is_fused(y)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_what_has_no_kernels_takes_the_plain_path():
    x, weight = torch.randn(1, 4, 4, 4), torch.randn(2, 4, 2, 2, requires_grad=True)
    assert not is_fused(kn_conv(x.double(), weight.double()))
    assert not is_fused(kn_conv(x, weight, mask=torch.ones_like(x, dtype=torch.bool)))
    with fused_kernels(False):
        assert not is_fused(kn_conv(x, weight))
    trained = torch.func.vmap(lambda image: kn_conv(image[None], weight), randomness="different")(x)
    assert trained.shape == (1, 1, 2, 3, 3)


def test_the_default_is_triton_on_gpus_alone():
    cpu = torch.empty(1)
    gpu = type("Tensor", (), {"is_cuda": True, "dtype": torch.bfloat16})()
    with fused_kernels(None):  # by monkeypatch the fixture's choice would come back after the test, and stay
        assert fused.find_passes(cpu, cpu) is None
        assert fused.find_passes(gpu, gpu) is fused_passes


def test_a_missing_triton_is_told(monkeypatch):
    monkeypatch.setattr(fused, "_HAS_TRITON", False)
    x, weight = torch.randn(1, 4, 4, 4), torch.randn(2, 4, 2, 2, requires_grad=True)
    with pytest.warns(UserWarning, match=r"run without fused kernels.*Triton is not installed.*pip install triton"):
        assert not is_fused(kn_conv(x, weight))


# ---- compilers


@pytest.mark.slow
def test_export_takes_plain_operations():
    layer, x = KNConv2d(3, 5, 3).eval(), torch.randn(2, 3, 6, 6)
    program = torch.export.export(layer, (x,))
    assert "knlightning" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.slow
def test_compilers_take_the_operators_as_they_are():
    torch.manual_seed(0)
    layer = nn.Sequential(KNConv2d(4, 6, 3, padding=1, dropout_p=0.3), nn.ReLU()).to(memory_format=LAST)
    x = torch.randn(2, 4, 5, 5).contiguous(memory_format=LAST).requires_grad_()
    found = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(5)
        y = run(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled)
        assert eager.stride() == compiled.stride()
    with torch.no_grad():
        layer.eval()
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck reads it
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("keep_output", [True, False])
def test_the_operators_are_as_torch_library_wants_them(keep_output, memory_format):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 5).contiguous(memory_format=memory_format).requires_grad_()
    weight, bias = torch.randn(6, 4, 3, 2, requires_grad=True), torch.randn(12)[::2].requires_grad_()
    seed = draw_seed(x.device)
    numbers = (keep_output, [1, 2], [1, 0, 2, 1], [1, 1], 1, 0.3, 1.0, 1e-5, True, False)
    operator = torch.ops.knlightning.kn_conv.default
    torch.library.opcheck(operator, (x, weight, bias, None, seed, *numbers))
    output, convolved, mean, rstd = operator(x.detach(), weight.detach(), bias.detach(), None, seed, *numbers)
    kept = output if keep_output else convolved
    tensors = (x, weight, bias, None, seed, output, kept, mean, rstd)
    backward = torch.ops.knlightning.kn_conv_backward.default
    detached = [None if t is None else t.detach() for t in tensors]
    torch.library.opcheck(backward, (*detached, [True, True, True], *numbers))
