"""The passes of `knlightning.nn.triton_kernels` as functions of tensors.

Tensors of images [N, C, *spatial] are contiguous, or channels-last in two and three dimensions.
"""

import math
from typing import Any

import torch
from torch import Tensor

from knlightning.nn import triton_kernels as kernels
from knlightning.nn.composite import Call, convolution_gradients, convolve, filter_sums
from knlightning.nn.windows import Window

__all__ = [
    "convolution_gradients",
    "convolve",
    "finish_gradient",
    "mask_of_seed",
    "moments",
    "normalize",
    "scale_gradient",
]

_TILE, _MOST_CHANNELS, _MOST_PIXELS = 4096, 128, 1024
"""Elements that a program takes at a time, 16 for each thread, and the most of those that are neighbours in memory."""
_PROGRAMS = 256
"""Programs that keep a GPU busy: about two for each of its multiprocessors."""
_WARPS = 8


def mask_of_seed(seed: Tensor, input: Tensor, dropout_p: float) -> Tensor:
    """Draw the mask of the other passes as a bool tensor of the input's shape, true where an element is kept."""
    mask = torch.empty_like(input, dtype=torch.bool)
    _over_images(kernels.mask_kernel, mask, (mask, seed), (), threshold=_threshold(dropout_p))
    return mask


def pixel_moments(
    input: Tensor, seed: Tensor | None, dropout_p: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute mean and biased variance over the channels of each dropped out pixel, in one pass.

    Args:
        input: Tensor [N, C, *spatial].
        seed: Int64 tensor [1] from which the mask is drawn, or None.
        dropout_p: Probability with which an element is dropped, if there is a seed.
        relu: Whether to take the ReLU of the input.

    Returns:
        Two float32 tensors [N, 1, *spatial], and the ReLU of the input if it is wanted.
    """
    mean, var = (input.new_empty((len(input), 1, *input.shape[2:]), dtype=torch.float32) for _ in range(2))
    rectified = torch.empty_like(input) if relu else None
    tensors = (input, rectified, mean, var, seed)
    threshold = _threshold(dropout_p)
    _over_images(kernels.pixel_moments_kernel, input, tensors, (1.0 / (1.0 - dropout_p),), threshold=threshold)
    return mean, var, rectified


def window_moments(mean: Tensor, var: Tensor, window: Window, inflation: float, eps: float) -> tuple[Tensor, Tensor]:
    """Merge the moments of pixels [N, 1, *spatial] into mean and 1 / sqrt(var + eps) of windows [N, 1, *positions]."""
    size = mean.shape[2:]
    positions = window.positions(size)
    merged, rstd = (mean.new_empty((len(mean), 1, *positions)) for _ in range(2))
    tensors = (mean, var, merged, rstd)
    _over_windows(kernels.window_moments_kernel, merged, tensors, size, positions, (inflation, eps), window)
    return merged, rstd


def moments(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute mean and 1 / sqrt(var + eps) of dropped out windows [N, 1, *positions], and sum each filter.

    Args:
        call: What is convolved.

    Returns:
        Means, 1 / sqrt(var + eps), the sums [O], and the ReLU of the input if it is wanted.
    """
    settings = call.settings
    mean, var, rectified = pixel_moments(call.input, call.seed, settings.dropout_p, settings.relu_input)
    moments = window_moments(mean, var, settings.window, settings.inflation, settings.eps)
    return *moments, filter_sums(call.weight, torch.float32), rectified


def normalize(call: Call, convolved: Tensor, mean: Tensor, rstd: Tensor, sums: Tensor, in_place: bool) -> Tensor:
    """Compute (convolved - mean * sums) * rstd + bias + residual, and its ReLU if wanted, in one pass."""
    output = convolved if in_place else torch.empty_like(convolved)
    tensors = (convolved, output, mean, rstd, sums, call.bias, call.residual)
    _over_images(kernels.normalize_kernel, convolved, tensors, (), relu=call.settings.relu_output)
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
    """Scale the gradient by rstd, behind the ReLU if there is one, and take all sums of it, in one pass.

    Args:
        call: What was convolved.
        grad: Gradient at the output [N, O, *positions].
        kept: The output (`kept_output`) or the result of the convolution, in the format of grad.
        mean: Means of the windows [N, 1, *positions].
        rstd: 1 / sqrt(var + eps) of the windows.
        sums: Sums of the filters [O].
        kept_output: What is kept.
        needs_maps: Whether the gradient through the statistics is wanted.

    Returns:
        The scaled gradient; float32 maps [N, 2, *positions] or None; and sums over positions [O], of the gradient and
        of the scaled one times the mean.
    """
    settings = call.settings
    scaled = torch.empty_like(grad)
    maps = mean.new_empty((len(mean), 2, *mean.shape[2:])) if needs_maps else None
    block_p, _ = blocks = _tile(grad)
    partial = mean.new_empty(_programs(grad, block_p), 2, len(sums))
    tensors = (grad, kept, call.residual, mean, rstd, sums, call.bias, scaled, maps, partial)
    scale = 1.0 if call.seed is None else 1.0 / (1.0 - settings.dropout_p)
    share = scale / (call.input.shape[1] * math.prod(settings.window.kernel_size))
    constants = {"kept_output": kept_output, "relu": settings.relu_output}
    numbers = (settings.inflation, share, share * scale)
    _over_images(kernels.scale_gradient_kernel, grad, tensors, numbers, blocks=blocks, **constants)
    return scaled, maps, *partial.sum(0)


def finish_gradient(
    call: Call, d_input: Tensor | None, d_weight: Tensor | None, maps: Tensor | None, d_sums: Tensor
) -> None:
    """Add the gradients through the statistics to those through the convolution, in place; then pass the ReLU.

    Args:
        call: What was convolved.
        d_input: Gradient of the input through the convolution, or None.
        d_weight: Gradient of the filters through it, or None.
        maps: What `scale_gradient` returns.
        d_sums: The last sums that `scale_gradient` returns.
    """
    input, settings = call.input, call.settings
    if d_weight is not None:
        d_weight -= d_sums.to(d_weight.dtype).view(-1, *(1,) * (d_weight.dim() - 1))
    if d_input is None or maps is None:
        return
    size, positions = input.shape[2:], maps.shape[2:]
    pixel_maps = maps.new_empty((len(input), 2, *size))
    kernel, window = kernels.windows_transposed_kernel, settings.window
    _over_windows(kernel, pixel_maps, (maps, pixel_maps), size, positions, (), window)
    constants = {"threshold": _threshold(settings.dropout_p), "relu": settings.relu_input}
    _over_images(kernels.finish_gradient_kernel, input, (d_input, input, pixel_maps, call.seed), (), **constants)


def _over_images(
    kernel: Any, like: Tensor, tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...], **constants: Any
) -> None:
    """Launch a kernel whose programs each take a block of pixels of one image."""
    block_p, block_c = constants.pop("blocks", None) or _tile(like)
    pixels = math.prod(like.shape[2:])
    constants |= {"channels": like.shape[1], "channels_last": not like.is_contiguous()}
    _launch(kernel, _programs(like, block_p), *tensors, pixels, *numbers, **constants, block_p=block_p, block_c=block_c)


def _over_windows(
    kernel: Any,
    like: Tensor,
    tensors: tuple[Tensor, ...],
    size: tuple[int, ...],
    positions: tuple[int, ...],
    numbers: tuple[float, ...],
    window: Window,
) -> None:
    """Launch a kernel whose programs each take a block of a map with all elements of the windows there."""
    elements, pixels = _power(math.prod(window.kernel_size)), math.prod(like.shape[2:])
    block = max(1, min(_power(pixels), 2048 // elements))
    geometry = {
        "kernel_size": _three(window.kernel_size),
        "stride": _three(window.stride),
        "padding": _three([before for before, _ in window.padding], 0),
        "dilation": _three(window.dilation),
    }
    sizes = (*_three(size), *_three(positions))
    _launch(kernel, _programs(like, block), *tensors, *sizes, *numbers, **geometry, block=block, elements=elements)


def _launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    if programs:
        with torch.cuda.device_of(args[0]):
            kernel[(programs,)](*args, **constants, num_warps=_WARPS)


def _tile(tensor: Tensor) -> tuple[int, int]:
    """Choose the pixels and channels that a program takes at a time."""
    samples, channels, pixels = len(tensor), _power(tensor.shape[1]), _power(math.prod(tensor.shape[2:]))
    most = _TILE // 32 if tensor.is_contiguous() else _MOST_PIXELS  # neighbours in memory are pixels or channels
    block_p = min(pixels, most, _TILE // min(channels, _MOST_CHANNELS))
    while block_p > 16 and samples * (pixels // block_p) < _PROGRAMS:
        block_p //= 2
    return block_p, max(4, min(channels, _MOST_CHANNELS, _TILE // block_p))


def _programs(tensor: Tensor, block_p: int) -> int:
    return len(tensor) * -(-math.prod(tensor.shape[2:]) // block_p)


def _power(number: int) -> int:
    """Return the least power of two that is not below a number."""
    return 1 << max(number - 1, 0).bit_length()


def _three(values: Any, missing: int = 1) -> tuple[int, ...]:
    """Fill up with leading dimensions of one element."""
    return (missing,) * (3 - len(values)) + tuple(values)


def _threshold(dropout_p: float) -> int:
    return min(round(dropout_p * 2**32), 2**32 - 1)
