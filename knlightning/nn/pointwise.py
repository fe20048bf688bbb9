"""The kernel normalized convolution of single pixels: each pixel is standardized, and convolved in the usual way.

Larger windows overlap, and their results are normalized instead; see `knlightning.nn.fused`. Here nothing of the size
of the output is kept for backward, unless there is a ReLU behind it, and the filters are not summed.
"""

import math
from typing import Any

import torch
from torch import Tensor

from knlightning.nn import cpu_passes
from knlightning.nn.composite import CHANNELS_LAST, Call, composite_gradients


def is_faster(call: Call) -> bool:
    """Whether to standardize the input rather than normalize the result; as measured with batches of two.

    It does not depend on the size of the batch, so that samples do not depend on each other.
    """
    window = call.settings.window
    if not window.of_pixels:
        return False
    pixels, filters = math.prod(call.input.shape[2:]), call.weight.shape[0]
    if not torch.is_grad_enabled():  # the result is still in the caches; many filters are not
        return filters > 8 * pixels
    saved = 0 if call.settings.relu_output else 4 * filters
    return pixels * (3 * call.input.shape[1] - saved) < call.weight.numel() / 2


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, mean and 1 / sqrt(var + eps) of the pixels."""
    standardized, mean, rstd = cpu_passes.standardize(call)
    output = cpu_passes.convolve(standardized, call.weight, call.settings, call.bias)
    if call.residual is not None:
        output += call.residual
    return output.relu_() if call.settings.relu_output else output, mean, rstd


class Pointwise(torch.autograd.Function):
    """Convolution of kernel normalized pixels by the passes for CPUs; see `knlightning.nn.kn_conv`.

    With z = (x - mean) * r, the output is y = conv(z, W) + b. Its gradients are those of a convolution of z, and with
    g = igrad(G, W) at z, and the names of `knlightning.nn.autograd.KNConvFunction`:

        d_mean = -r * sum_c g,  d_var = -r^3 / 2 * sum_c g * (x - mean),
        dx = g * r + m / (1 - p) * (d_mean - 2 * d_var * mean + 2 * d_var * x') / C.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        call = Call._make(inputs)
        output, mean, rstd = forward(call)
        shown = output if call.settings.relu_output else None
        ctx.save_for_backward(call.input, mean, rstd, *call[1:5], shown)
        ctx.settings = call.settings
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, mean, rstd, *rest, shown = ctx.saved_tensors
        call, needs = Call._make((input, *rest, ctx.settings)), ctx.needs_input_grad[:4]
        _, weight, bias, _, seed, settings = call
        if torch.is_grad_enabled():  # a graph of the gradient is wanted: differentiate the operations
            mask = None if seed is None else cpu_passes.mask_of_seed(seed, input, settings.dropout_p)
            return *composite_gradients(call[:4], mask, grad, needs, settings), None, None
        d_residual = grad if needs[3] else None
        if shown is not None:
            grad = torch.ops.aten.threshold_backward(grad, shown, 0)
        standardized = cpu_passes.standardize(call, (mean, rstd))[0]
        d_input, d_weight, d_bias = cpu_passes.convolution_gradients(
            grad.contiguous(memory_format=CHANNELS_LAST[input.dim()]), standardized, weight, settings, needs[:3], bias
        )
        if d_input is not None:
            d_input = d_input.contiguous(memory_format=CHANNELS_LAST[input.dim()])
            cpu_passes.standardize_backward(call, d_input, mean, rstd)
        return d_input, d_weight, d_bias, d_residual, None, None
