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
from ctypes import c_bool, c_float, c_int64, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knlightning.nn.autograd import Settings

_SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
_FLAGS = "-O3 -std=c++17 -shared -fPIC -fopenmp -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math"
_TARGETS = {"AVX512": "-march=x86-64-v4", "AVX2": "-march=x86-64-v3"}
"""What the processor understands, as torch knows it, as flags of the compiler."""
_ARGUMENTS = {
    "knl_mask": (c_void_p, c_void_p, c_uint32, c_int64, c_int64),
    "knl_moments": (c_void_p,) * 8,
    "knl_normalize": (*(c_void_p,) * 7, c_bool, c_int64, c_int64),
    "knl_scale_gradient": (*(c_void_p,) * 11, *(c_float,) * 3, c_bool, c_bool, *(c_int64,) * 3),
    "knl_finish_gradient": (c_void_p,) * 7,
    "knl_standardize": (*(c_void_p,) * 6, c_bool),
    "knl_standardize_backward": (c_void_p,) * 6,
}


class _Plan(ctypes.Structure):
    """`Plan` of the kernels."""

    _fields_ = (
        ("windows", c_int64 * 18),
        *((name, c_int64) for name in ("samples", "channels", "filters", "filter_size")),
        *((name, c_float) for name in ("scale", "inflation", "eps")),
        ("threshold", c_uint32),
        ("relu_input", c_bool),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
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


def _library() -> ctypes.CDLL:
    found = library()
    assert found is not None
    return found


def mask_of_seed(seed: Tensor, input: Tensor, dropout_p: float) -> Tensor:
    """Draw the mask of the other passes as a bool tensor of the input's shape, true where an element is kept."""
    mask = torch.empty_like(input, dtype=torch.bool)
    rows, channels = input.numel() // input.shape[1], input.shape[1]
    _library().knl_mask(mask.data_ptr(), seed.data_ptr(), _threshold(dropout_p), rows, channels)
    return mask


def moments(
    input: Tensor, weight: Tensor, seed: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See `knlightning.nn.fused_passes.moments`. Filters are dense in memory, in the usual or channels-last format."""
    plan, shape = _plan(settings, input.shape, weight.shape)
    mean, rstd, sums = input.new_empty(shape), input.new_empty(shape), input.new_empty(weight.shape[0])
    rectified = torch.empty_like(input) if settings.relu_input else None
    _library().knl_moments(
        plan, input.data_ptr(), weight.data_ptr(), _pointer(seed), _pointer(rectified),
        mean.data_ptr(), rstd.data_ptr(), sums.data_ptr(),
    )  # fmt: skip
    return mean, rstd, sums, rectified


def normalize(
    convolved: Tensor,
    mean: Tensor,
    rstd: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    in_place: bool,
) -> Tensor:
    """See `knlightning.nn.fused_passes.normalize`."""
    output = convolved if in_place else torch.empty_like(convolved)
    _library().knl_normalize(
        convolved.data_ptr(), output.data_ptr(), mean.data_ptr(), rstd.data_ptr(), sums.data_ptr(),
        _pointer(bias), _pointer(residual), relu, mean.numel(), sums.shape[0],
    )  # fmt: skip
    return output


def scale_gradient(
    grad: Tensor,
    kept: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    inflation: float,
    share: float,
    window_size: int,
    kept_output: bool,
    relu: bool,
    needs_maps: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """See `knlightning.nn.fused_passes.scale_gradient`. The maps are flat."""
    scaled, d_bias, d_sums = torch.empty_like(grad), torch.empty_like(sums), torch.empty_like(sums)
    maps = mean.new_empty(2 * mean.numel()) if needs_maps else None
    samples = mean.shape[0]
    _library().knl_scale_gradient(
        grad.data_ptr(), kept.data_ptr(), _pointer(residual), mean.data_ptr(), rstd.data_ptr(), sums.data_ptr(),
        _pointer(bias), scaled.data_ptr(), _pointer(maps), d_bias.data_ptr(), d_sums.data_ptr(),
        inflation, 1.0 / (window_size * share), 1.0 / (window_size * share**2),
        kept_output, relu, samples, mean.numel() // max(samples, 1), sums.shape[0],
    )  # fmt: skip
    return scaled, maps, d_bias, d_sums


def finish_gradient(
    d_input: Tensor | None,
    d_weight: Tensor | None,
    input: Tensor,
    weight: Tensor,
    maps: Tensor | None,
    d_sums: Tensor,
    seed: Tensor | None,
    settings: Settings,
) -> None:
    """See `knlightning.nn.fused_passes.finish_gradient`."""
    _library().knl_finish_gradient(
        _plan(settings, input.shape, weight.shape)[0], _pointer(d_input), _pointer(d_weight),
        input.data_ptr(), _pointer(maps), d_sums.data_ptr(), _pointer(seed),
    )  # fmt: skip


def standardize(
    input: Tensor, weight: Tensor, seed: Tensor | None, settings: Settings, moments: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize each pixel of the ReLU of the input, if wanted, or of the input.

    Args:
        input: Tensor [N, C, *spatial].
        weight: Filters of a single pixel.
        seed: Int64 tensor [1] from which the mask is drawn, or None.
        settings: The settings.
        moments: What was returned before, if it is known.

    Returns:
        The normalized input, and mean and 1 / sqrt(var + eps) of the dropped out pixels [N, 1, *spatial].
    """
    plan, shape = _plan(settings, input.shape, weight.shape)
    output = torch.empty_like(input)
    mean, rstd = moments or (input.new_empty(shape), input.new_empty(shape))
    _library().knl_standardize(
        plan, input.data_ptr(), output.data_ptr(), mean.data_ptr(), rstd.data_ptr(), _pointer(seed), moments is not None
    )
    return output, mean, rstd


def standardize_backward(
    grad: Tensor, input: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, seed: Tensor | None, settings: Settings
) -> None:
    """Turn the gradient at the result of `standardize` into that at its input, in place."""
    _library().knl_standardize_backward(
        _plan(settings, input.shape, weight.shape)[0], grad.data_ptr(), input.data_ptr(),
        mean.data_ptr(), rstd.data_ptr(), _pointer(seed),
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
        1.0 / (1.0 - p), settings.inflation, settings.eps, _threshold(p), settings.relu_input,
    ))  # fmt: skip
    return plan, (size[0], 1, *positions)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threshold(dropout_p: float) -> int:
    return min(round(dropout_p * 2**32), 2**32 - 1)
