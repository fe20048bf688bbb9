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

import torch
from torch import Tensor

from knlightning.nn.windows import Window

_SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
_FLAGS = "-O3 -std=c++17 -shared -fPIC -fopenmp -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math"
_TARGETS = {"AVX512": "-march=x86-64-v4", "AVX2": "-march=x86-64-v3"}
"""What the processor understands, as torch knows it, as flags of the compiler."""
_DROPOUT, _IMAGES = (c_void_p, c_uint32), (c_int64, c_int64)
_ARGUMENTS = {
    "knl_mask": (c_void_p, *_DROPOUT, *_IMAGES),
    "knl_moments": (*(c_void_p,) * 4, *_DROPOUT, c_float, c_void_p, c_float, c_float, *_IMAGES),
    "knl_sums": (c_void_p, c_void_p, *_IMAGES),
    "knl_normalize": (*(c_void_p,) * 7, c_bool, *_IMAGES),
    "knl_scale_gradient": (*(c_void_p,) * 10, *(c_float,) * 3, c_bool, c_bool, c_int64, *_IMAGES),
    "knl_finish_gradient": (*(c_void_p,) * 3, *_DROPOUT, c_bool, c_void_p, *_IMAGES),
}


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
    input: Tensor, seed: Tensor | None, dropout_p: float, relu: bool, window: Window, inflation: float, eps: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `knlightning.nn.fused_passes.moments`."""
    geometry, positions = _geometry(window, input.shape[2:])
    mean = input.new_empty((input.shape[0], 1, *positions))
    rstd = torch.empty_like(mean)
    rectified = torch.empty_like(input) if relu else None
    _library().knl_moments(
        input.data_ptr(), _pointer(rectified), mean.data_ptr(), rstd.data_ptr(),
        _pointer(seed), _threshold(dropout_p), 1.0 / (1.0 - dropout_p),
        geometry, inflation, eps, input.shape[0], input.shape[1],
    )  # fmt: skip
    return mean, rstd, rectified


def filter_sums(weight: Tensor) -> Tensor:
    """Sum each filter; shape [O]. Filters are dense in memory in the usual and in the channels-last format."""
    sums = weight.new_empty(weight.shape[0])
    _library().knl_sums(weight.data_ptr(), sums.data_ptr(), weight.shape[0], weight.numel() // max(weight.shape[0], 1))
    return sums


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
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `knlightning.nn.fused_passes.scale_gradient`."""
    scaled = torch.empty_like(grad)
    maps = mean.new_empty((mean.shape[0], 2, *mean.shape[2:])) if needs_maps else None
    over_rows = mean.new_empty((2, sums.shape[0]))
    _library().knl_scale_gradient(
        grad.data_ptr(), kept.data_ptr(), _pointer(residual), mean.data_ptr(), rstd.data_ptr(), sums.data_ptr(),
        _pointer(bias), scaled.data_ptr(), _pointer(maps), over_rows.data_ptr(),
        inflation, 1.0 / (window_size * share), 1.0 / (window_size * share**2),
        kept_output, relu, mean.shape[0], math.prod(mean.shape[2:]), sums.shape[0],
    )  # fmt: skip
    return scaled, maps, over_rows


def finish_gradient(
    d_input: Tensor, input: Tensor, maps: Tensor, seed: Tensor | None, dropout_p: float, window: Window, relu: bool
) -> None:
    """See `knlightning.nn.fused_passes.finish_gradient`."""
    _library().knl_finish_gradient(
        d_input.data_ptr(), input.data_ptr(), maps.data_ptr(), _pointer(seed), _threshold(dropout_p), relu,
        _geometry(window, input.shape[2:])[0], input.shape[0], input.shape[1],
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _geometry(window: Window, size: torch.Size) -> tuple["ctypes.Array[c_int64]", tuple[int, ...]]:
    """Lay windows out as the kernels read them, in three dimensions each; return the positions too."""
    positions, before = window.positions(size), [before for before, _ in window.padding]
    values = (window.kernel_size, window.stride, before, window.dilation, size, positions)
    numbers = [n for v in values for n in (*(0 if v is before else 1,) * (3 - len(size)), *v)]
    return (c_int64 * len(numbers))(*numbers), positions


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threshold(dropout_p: float) -> int:
    return min(round(dropout_p * 2**32), 2**32 - 1)
