"""The kernel normalized convolution by fused kernels: torch's convolutions, and as few passes as possible around them.

The passes are those of `knlightning.nn.fused_passes` on GPUs, and of `knlightning.nn.cpu_passes` on CPUs. Forward, one
pass reads the input for its statistics and one turns the convolution's result into the output; or on CPUs, where it is
less work, one standardizes the input (`knlightning.nn.pointwise`). Backward, one pass
scales the gradient and sums it up, and one finishes the gradient of the input. The mask of dropout is drawn in each of
them from a seed, and never stored. The formulas are those of `knlightning.nn.autograd.KNConvFunction`.

The operators are known to `torch.library`, so that compilers take them as they are.
"""

import importlib.util
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from knlightning.nn import cpu_passes, pointwise
from knlightning.nn.composite import (
    CHANNELS_LAST,
    Call,
    Settings,
    composite_gradients,
    filter_sums,
    is_channels_last,
)
from knlightning.nn.kept_results import KeptResult
from knlightning.nn.windows import Window

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FORWARD, _BACKWARD = "knlightning::kn_conv", "knlightning::kn_conv_backward"
_SETTINGS = (
    "bool keep_output, int[] stride, int[] pads, int[] dilation, int groups, "
    "float dropout_p, float inflation, float eps, bool relu_input, bool relu_output"
)
torch.library.define(
    _FORWARD,
    f"(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, Tensor? seed, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    _BACKWARD,
    "(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, Tensor? seed, Tensor grad, Tensor kept, "
    f"Tensor mean, Tensor rstd, bool[] needs, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_NO_TRITON = (
    "kernel normalized convolutions run without fused kernels, which takes more time and memory, because Triton is not "
    "installed. It comes with torch for Linux; pip install triton adds it"
)
_choice = {"0": False, "1": True}.get(os.environ.get("KNL_FUSED", ""))


@contextmanager
def fused_kernels(enabled: bool) -> Iterator[None]:
    """Let kernel normalized convolutions run by fused kernels, or not, whatever the device.

    Without it they do on GPUs, if Triton can be imported, in float32, bfloat16 and float16; and on CPUs in float32 and
    channels-last, if a C++ compiler is there (`knlightning.nn.cpu_passes`). The environment variable KNL_FUSED=0 or
    KNL_FUSED=1 chooses for a whole process. If they are enabled so on a CPU, those of Triton run in its interpreter
    (TRITON_INTERPRET=1), which is slow and meant for tests.

    Args:
        enabled: Whether they do.
    """
    global _choice
    before, _choice = _choice, enabled
    try:
        yield
    finally:
        _choice = before


def find_passes(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    compiling: bool = False,
) -> ModuleType | None:
    """Choose the fused kernels by which a convolution runs, from its tensors as autocast leaves them.

    Returns:
        `knlightning.nn.fused_passes`, `knlightning.nn.cpu_passes`, or None for plain operations.
    """
    if _choice is None and not input.is_cuda:
        last = CHANNELS_LAST.get(input.dim())
        if compiling or last is None or type(input) is not Tensor:  # compilers must see the operations
            return None
        for tensor in (input, weight, bias, residual):  # they are read by their addresses
            if tensor is not None and not (tensor.is_cpu and tensor.dtype == torch.float32):
                return None
        in_order = weight.is_contiguous()
        fits = input.is_contiguous(memory_format=last) and (in_order or weight.is_contiguous(memory_format=last))
        if not fits or (in_order and input.is_contiguous()) or (bias is not None and not bias.is_contiguous()):
            return None
        if residual is not None and not residual.is_contiguous(memory_format=last):
            return None
        return None if cpu_passes.library() is None else cpu_passes
    if not (input.is_cuda if _choice is None else _choice):
        return None
    if not _HAS_TRITON:
        warnings.warn(_NO_TRITON, stacklevel=2)  # shown once, as Python's warnings are
    if not (_HAS_TRITON and input.dtype == weight.dtype and input.dtype in _DTYPES):
        return None
    return _triton()


def _triton() -> ModuleType:
    from knlightning.nn import fused_passes  # needs Triton

    return fused_passes


def draw_seed(device: torch.device) -> Tensor:
    """Draw the seed of a mask, a tensor [1] of 64 bits, from torch's generator of the device."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), device=device)


def fused_kn_conv(call: Call, keep_output: bool, passes: ModuleType) -> Tensor:
    """Compute a kernel normalized convolution; see `knlightning.nn.kn_conv`.

    Args:
        call: Its tensors, of a dtype with kernels, and its settings.
        keep_output: Whether to keep the output for backward, in place of the convolution's result.
        passes: What `find_passes` returns.
    """
    learning = torch.is_grad_enabled()
    if passes is cpu_passes and pointwise.is_faster(call):
        return pointwise.Pointwise.apply(*call) if learning else pointwise.forward(call)[0]
    if passes is cpu_passes and not learning:
        return cpu_passes.forward(call)
    if passes is not cpu_passes and torch.compiler.is_compiling():
        return torch.ops.knlightning.kn_conv.default(*call[:5], keep_output, *_flatten(call.settings))[0]
    # without the operator, whose dispatch in Python takes longer than many a convolution on a GPU
    return _Eager.apply(*call, keep_output, passes) if learning else _forward(call, keep_output, passes)[0]


def _flatten(settings: Settings) -> list[Any]:
    window = settings.window
    numbers = [getattr(settings, field.name) for field in fields(settings) if field.name != "window"]
    return [list(window.stride), list(window.pads), list(window.dilation), *numbers]


def _unpack(weight: Tensor, stride: list[int], pads: list[int], dilation: list[int], *numbers: Any) -> Settings:
    padding = tuple(zip(pads[-2::-2], pads[::-2], strict=True))
    return Settings(Window(tuple(weight.shape[2:]), tuple(stride), padding, tuple(dilation)), *numbers)


def _forward(call: Call, keep_output: bool, passes: ModuleType) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return output, result of the convolution (the same with `keep_output`), mean, rstd, and sums of the filters."""
    if passes is cpu_passes:
        memory_format = CHANNELS_LAST[call.input.dim()]
    else:
        call, memory_format = _dense(call)
    mean, rstd, sums, rectified = passes.moments(call)
    convolved = passes.convolve(call.input if rectified is None else rectified, call.weight, call.settings)
    convolved = convolved.contiguous(memory_format=memory_format)
    output = passes.normalize(call, convolved, mean, rstd, sums, keep_output)
    return output, convolved, mean, rstd, sums


def _fake_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    keep_output: bool,
    *numbers: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    positions = _unpack(weight, *numbers).window.positions(input.shape[2:])
    shape = (input.shape[0], weight.shape[0], *positions)
    output = input.new_empty(shape).contiguous(memory_format=_format(input, weight))
    mean, rstd = (input.new_empty((input.shape[0], 1, *positions), dtype=torch.float32) for _ in range(2))
    return output, input.new_empty(0) if keep_output else torch.empty_like(output), mean, rstd


def _format(*tensors: Tensor) -> torch.memory_format:
    """Choose the format that torch's convolutions give their result: channels-last if one of the tensors has it."""
    for tensor in tensors:
        if not tensor.is_contiguous() and is_channels_last(tensor):
            return CHANNELS_LAST[tensor.dim()]
    return torch.contiguous_format


def _dense(call: Call) -> tuple[Call, torch.memory_format]:
    """Make sure of the formats in memory, whatever a compiler made of them; return that of the output, too."""
    input, weight, bias, residual, seed, settings = call
    own = _format(input)
    memory_format = own if own != torch.contiguous_format else _format(weight)
    input = input.contiguous(memory_format=own)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous(memory_format=memory_format)
    return Call(input, weight, bias, residual, seed, settings), memory_format


def _save(ctx: Any, call: Call, mean: Tensor, rstd: Tensor, kept: Tensor | None, keep_output: bool) -> None:
    ctx.save_for_backward(call.input, mean, rstd, *call[1:5], kept)
    ctx.keep_output, ctx.settings = keep_output, call.settings


def _differentiate(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    input, mean, rstd, *rest, kept = ctx.saved_tensors
    call, needs = Call._make((input, *rest, ctx.settings)), ctx.needs_input_grad[:4]
    nothing = (None,) * (len(ctx.needs_input_grad) - 4)
    if torch.is_grad_enabled():  # a graph of the gradient is wanted: differentiate the operations
        mask = None if call.seed is None else ctx.passes.mask_of_seed(call.seed, input, ctx.settings.dropout_p)
        return *composite_gradients(call[:4], mask, grad, needs, ctx.settings), *nothing
    keep_output = ctx.keep_output
    if kept is None:
        kept, keep_output = ctx.kept.take(grad) if needs[0] else (grad, False)  # else it is not read
    gradients = ctx.run(call, grad, kept, mean, rstd, list(needs[:3]), keep_output)
    found = [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=False)]
    return *found, grad if needs[3] else None, *nothing


def _backward(
    call: Call,
    grad: Tensor,
    kept: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs: list[bool],
    keep_output: bool,
    passes: ModuleType,
    sums: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input, weight and bias; empty tensors for those that are not needed."""
    call, memory_format = _dense(call)
    input, weight, bias, _, _, settings = call
    x = input.relu() if settings.relu_input else input
    if kept is None:
        with torch.autocast(grad.device.type, enabled=False):  # whatever backward itself is called under
            kept, keep_output = passes.convolve(x, weight, settings), False
    grad = grad.to(kept.dtype).contiguous(memory_format=memory_format)
    kept = kept.contiguous(memory_format=memory_format)
    sums = filter_sums(weight, torch.float32) if sums is None else sums
    scaled, maps, d_bias, d_sums = passes.scale_gradient(call, grad, kept, mean, rstd, sums, keep_output, needs[0])
    d_input, d_weight, _ = passes.convolution_gradients(scaled, x, weight, settings, (needs[0], needs[1], False))
    if needs[0]:
        d_input = d_input.contiguous(memory_format=_format(input))
    if needs[1]:
        d_weight = d_weight.contiguous(memory_format=_format(weight))
    passes.finish_gradient(call, d_input, d_weight, maps, d_sums)
    gradients = (d_input, d_weight, d_bias.to(bias.dtype) if needs[2] and bias is not None else None)
    return tuple(input.new_empty(0) if gradient is None else gradient for gradient in gradients)  # type: ignore[return-value]


def _fake_backward(input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs = rest[6]
    d_input, d_weight = (
        tensor.new_empty(tensor.shape).contiguous(memory_format=_format(tensor)) if needed else tensor.new_empty(0)
        for tensor, needed in zip((input, weight), needs[:2], strict=True)
    )
    return d_input, d_weight, input.new_empty(0) if bias is None or not needs[2] else torch.empty_like(bias)


# ---- the operators, whose settings are numbers


def _call(tensors: Sequence[Any], numbers: Sequence[Any]) -> Call:
    return Call._make((*tensors, _unpack(tensors[1], *numbers)))


def _forward_by_numbers(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keep_output, *numbers = inputs[5:]
    output, convolved, mean, rstd, _ = _forward(_call(inputs[:5], numbers), keep_output, _triton())
    return output, output.new_empty(0) if keep_output else convolved, mean, rstd


def _backward_by_numbers(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad, kept, mean, rstd, needs, keep_output, *numbers = inputs[5:]
    return _backward(_call(inputs[:5], numbers), grad, kept, mean, rstd, needs, keep_output, _triton())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    keep_output, *numbers = inputs[5:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    result, convolved, mean, rstd = output
    _save(ctx, _call(inputs[:5], numbers), mean, rstd, result if keep_output else convolved, keep_output)
    backward = torch.ops.knlightning.kn_conv_backward.default
    ctx.passes, ctx.run = _triton(), lambda call, *rest: backward(*call[:5], *rest, *numbers)


torch.library.impl(_FORWARD, "default", _forward_by_numbers)
torch.library.register_fake(_FORWARD, _fake_forward)
torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_setup_context)
torch.library.impl(_BACKWARD, "default", _backward_by_numbers)
torch.library.register_fake(_BACKWARD, _fake_backward)


class _Eager(torch.autograd.Function):
    """The operator `knlightning::kn_conv` with its gradient, without what `torch.library` does at each call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *given, keep_output, passes = inputs
        call = Call._make(given)
        output, convolved, mean, rstd, sums = _forward(call, keep_output, passes)
        _save(ctx, call, mean, rstd, output if keep_output else None, keep_output)
        if not keep_output and ctx.needs_input_grad[0]:
            ctx.kept = KeptResult(convolved, output)
        ctx.passes, ctx.run = passes, partial(_backward, passes=passes, sums=sums)
        return output

    backward = staticmethod(_differentiate)
