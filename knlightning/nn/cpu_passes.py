"""The passes of `cpu_kernels.cpp` as functions of tensors: those of `knlightning.nn.fused_passes`, for CPUs.

Tensors are float32, and those of images [N, C, *spatial] are channels-last.
"""

import ctypes
import functools
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import c_bool, c_float, c_int64, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knlightning.nn import composite
from knlightning.nn.composite import CHANNELS_LAST, Call, Settings

_SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
_FLAGS = "-O3 -std=c++17 -shared -fPIC -fopenmp -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math"
_TARGETS = {"AVX512": "-march=x86-64-v4", "AVX2": "-march=x86-64-v3"}
"""What the processor understands, as torch knows it, as flags of the compiler."""
_ARGUMENTS = {
    "knl_mask": (c_void_p, c_void_p, c_uint32, c_int64, c_int64),
    "knl_moments": (c_void_p,) * 8,
    "knl_normalize": (c_void_p,) * 8,
    "knl_scale_gradient": (*(c_void_p,) * 13, c_bool),
    "knl_finish_gradient": (c_void_p,) * 7,
    "knl_standardize": (*(c_void_p,) * 6, c_bool),
    "knl_standardize_backward": (c_void_p,) * 6,
}
_FORWARD, _BACKWARD = (256, 512), (65, 8192)
"""Channels and pixels of a batch: products of matrices are faster than torch's convolutions of pixels forward with
fewer channels than these, backward with at least these, and with no more pixels; as measured with two threads."""


class _Plan(ctypes.Structure):
    """`Plan` of the kernels."""

    _fields_ = (
        ("windows", c_int64 * 18),
        *((name, c_int64) for name in ("samples", "channels", "filters", "filter_size")),
        *((name, c_float) for name in ("scale", "inflation", "eps")),
        ("threshold", c_uint32),
        *((name, c_bool) for name in ("relu_input", "relu_output")),
    )


@functools.cache
def library() -> Any:
    """Load the kernels; the first time on a machine a C++ compiler makes them, in the cache directory of `torch.hub`.

    Returns:
        The library, or None if they cannot be compiled here.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    flags = [*_FLAGS.split(), *filter(None, [_TARGETS.get(torch.backends.cpu.get_cpu_capability())])]
    name = hashlib.sha256(_SOURCE.read_bytes() + repr(flags).encode()).hexdigest()[:16]
    path = Path(torch.hub.get_dir(), "knlightning", f"cpu_kernels_{name}.so")
    try:
        if not path.exists():
            if compiler is None:
                return None
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as directory:  # other processes see it whole or not
                made = Path(directory, path.name)
                subprocess.run([compiler, *flags, _SOURCE, "-o", made], check=True, capture_output=True)
                made.replace(path)
        found = ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError):
        return None
    for function, arguments in _ARGUMENTS.items():
        getattr(found, function).argtypes = arguments
        getattr(found, function).restype = None
    return found


def mask_of_seed(seed: Tensor, input: Tensor, dropout_p: float) -> Tensor:
    """Draw the mask of the other passes as a bool tensor of the input's shape, true where an element is kept."""
    mask = torch.empty_like(input, dtype=torch.bool)
    rows, channels = input.numel() // input.shape[1], input.shape[1]
    library().knl_mask(mask.data_ptr(), seed.data_ptr(), _threshold(dropout_p), rows, channels)
    return mask


def convolve(input: Tensor, weight: Tensor, settings: Settings, bias: Tensor | None = None) -> Tensor:
    """Convolve; single pixels by a product of matrices, if that is faster: few of them, or of few channels."""
    fast = input.shape[1] < _FORWARD[0] or input.numel() <= _FORWARD[1] * input.shape[1]
    if settings.groups > 1 or not (fast and settings.window.of_pixels):
        return composite.convolve(input, weight, settings, bias)
    shape = (len(input), len(weight), *input.shape[2:])
    output = torch.empty(shape, dtype=input.dtype, memory_format=CHANNELS_LAST[input.dim()])  # not a view for autograd
    rows, filters = input.movedim(1, -1).flatten(0, -2), weight.flatten(1).t()
    into = output.movedim(1, -1).view(len(rows), len(weight))
    torch.mm(rows, filters, out=into) if bias is None else torch.addmm(bias, rows, filters, out=into)
    return output


def convolution_gradients(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    settings: Settings,
    needs: Sequence[bool],
    bias: Tensor | None = None,
) -> tuple[Any, Any, Any]:
    """Return the gradients of input, weight and bias of `convolve`; None for those that are not needed."""
    fast = input.shape[1] >= _BACKWARD[0] or input.numel() <= _BACKWARD[1] * input.shape[1]
    # torch would round the operands of a product, not those of convolution_backward
    if settings.groups > 1 or not (fast and settings.window.of_pixels) or torch.is_autocast_enabled("cpu"):
        return composite.convolution_gradients(grad, input, weight, settings, needs, bias)
    rows = grad.movedim(1, -1).flatten(0, -2)
    d_input = (rows @ weight.flatten(1)).view_as(input.movedim(1, -1)).movedim(-1, 1) if needs[0] else None
    d_weight = (rows.t() @ input.movedim(1, -1).flatten(0, -2)).view(weight.shape) if needs[1] else None
    return d_input, d_weight, rows.sum(0) if needs[2] else None


def forward(call: Call) -> Tensor:
    """Convolve without a gradient: `moments`, convolution and `normalize` in fewer steps, which small layers feel."""
    input, weight, bias, residual, seed, settings = call
    plan, shape = _plan(settings, input.shape, weight.shape)
    count, rectified = math.prod(shape), torch.empty_like(input) if settings.relu_input else None
    space = input.new_empty(2 * count + weight.shape[0])
    mean = space.data_ptr()
    rstd, sums = mean + 4 * count, mean + 8 * count
    library().knl_moments(
        plan, input.data_ptr(), weight.data_ptr(), None if seed is None else seed.data_ptr(),
        None if rectified is None else rectified.data_ptr(), mean, rstd, sums,
    )  # fmt: skip
    output = convolve(input if rectified is None else rectified, weight, settings)
    output = output.contiguous(memory_format=CHANNELS_LAST[input.dim()])
    library().knl_normalize(
        plan, output.data_ptr(), output.data_ptr(), mean, rstd, sums, None if bias is None else bias.data_ptr(),
        None if residual is None else residual.data_ptr(),
    )  # fmt: skip
    return output


def moments(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See `knlightning.nn.fused_passes.moments`. Filters are dense in memory, in the usual or channels-last format."""
    input, weight, _, _, seed, settings = call
    plan, shape = _plan(settings, input.shape, weight.shape)
    mean, rstd, sums = input.new_empty(shape), input.new_empty(shape), input.new_empty(weight.shape[0])
    rectified = torch.empty_like(input) if settings.relu_input else None
    library().knl_moments(
        plan, input.data_ptr(), weight.data_ptr(), _pointer(seed), _pointer(rectified),
        mean.data_ptr(), rstd.data_ptr(), sums.data_ptr(),
    )  # fmt: skip
    return mean, rstd, sums, rectified


def normalize(call: Call, convolved: Tensor, mean: Tensor, rstd: Tensor, sums: Tensor, in_place: bool) -> Tensor:
    """See `knlightning.nn.fused_passes.normalize`."""
    output = convolved if in_place else torch.empty_like(convolved)
    library().knl_normalize(
        _plan(call.settings, call.input.shape, call.weight.shape)[0], convolved.data_ptr(), output.data_ptr(),
        mean.data_ptr(), rstd.data_ptr(), sums.data_ptr(), _pointer(call.bias), _pointer(call.residual),
    )  # fmt: skip
    return output


def scale_gradient(
    call: Call,
    grad: Tensor,
    kept: Tensor,
    mean: Tensor,
    rstd: Tensor,
    sums: Tensor,
    kept_output: bool,
    needs_maps: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """See `knlightning.nn.fused_passes.scale_gradient`. The maps are flat."""
    scaled, d_bias, d_sums = torch.empty_like(grad), torch.empty_like(sums), torch.empty_like(sums)
    maps = mean.new_empty(2 * mean.numel()) if needs_maps else None
    library().knl_scale_gradient(
        _plan(call.settings, call.input.shape, call.weight.shape)[0], grad.data_ptr(), kept.data_ptr(),
        _pointer(call.residual), mean.data_ptr(), rstd.data_ptr(), sums.data_ptr(), _pointer(call.bias),
        _pointer(call.seed), scaled.data_ptr(), _pointer(maps), d_bias.data_ptr(), d_sums.data_ptr(), kept_output,
    )  # fmt: skip
    return scaled, maps, d_bias, d_sums


def finish_gradient(
    call: Call, d_input: Tensor | None, d_weight: Tensor | None, maps: Tensor | None, d_sums: Tensor
) -> None:
    """See `knlightning.nn.fused_passes.finish_gradient`."""
    library().knl_finish_gradient(
        _plan(call.settings, call.input.shape, call.weight.shape)[0], _pointer(d_input), _pointer(d_weight),
        call.input.data_ptr(), _pointer(maps), d_sums.data_ptr(), _pointer(call.seed),
    )  # fmt: skip


def standardize(call: Call, moments: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize each pixel of the ReLU of the input, if wanted, or of the input.

    Args:
        call: What is convolved, with filters of a single pixel.
        moments: What was returned before, if it is known.

    Returns:
        The normalized input, and mean and 1 / sqrt(var + eps) of the dropped out pixels [N, 1, *spatial].
    """
    input = call.input
    plan, shape = _plan(call.settings, input.shape, call.weight.shape)
    output = torch.empty_like(input)
    mean, rstd = moments or (input.new_empty(shape), input.new_empty(shape))
    library().knl_standardize(
        plan, input.data_ptr(), output.data_ptr(), mean.data_ptr(), rstd.data_ptr(), _pointer(call.seed),
        moments is not None,
    )  # fmt: skip
    return output, mean, rstd


def standardize_backward(call: Call, grad: Tensor, mean: Tensor, rstd: Tensor) -> None:
    """Turn the gradient at the result of `standardize` into that at its input, in place."""
    library().knl_standardize_backward(
        _plan(call.settings, call.input.shape, call.weight.shape)[0], grad.data_ptr(), call.input.data_ptr(),
        mean.data_ptr(), rstd.data_ptr(), _pointer(call.seed),
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _plan(settings: Settings, size: torch.Size, filters: torch.Size) -> tuple[Any, tuple[int, ...]]:
    """Lay out for the kernels what a convolution computes; return the shape of its moments, too."""
    window, before = settings.window, [before for before, _ in settings.window.padding]
    positions = window.positions(size[2:])
    each = (window.kernel_size, window.stride, before, window.dilation, size[2:], positions)
    windows = [n for v in each for n in (*(0 if v is before else 1,) * (5 - len(size)), *v)]
    p = settings.dropout_p
    plan = ctypes.byref(_Plan(
        (c_int64 * 18)(*windows), size[0], size[1], filters[0], math.prod(filters[1:]),
        1.0 / (1.0 - p), settings.inflation, settings.eps, _threshold(p), settings.relu_input, settings.relu_output,
    ))  # fmt: skip
    return plan, (size[0], 1, *positions)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threshold(dropout_p: float) -> int:
    return min(round(dropout_p * 2**32), 2**32 - 1)
