"""Parity of the two ways to compute a kernel normalized convolution: fused kernels, and plain operations.

Both are compared with the plain operations in float64, with the same mask of dropout.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from knlightning.nn import fused_kernels, kn_conv
from knlightning.nn.fused import draw_seed

DROPOUT = 0.05
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def compare_paths(
    device: str, channels: int = 256, size: int = 32, dtypes: Sequence[torch.dtype] = DTYPES
) -> list[dict[str, Any]]:
    """Compare outputs and gradients of a layer with what surrounds it in a network.

    Args:
        device: Where to run: "cuda", or "cpu" in a process whose Triton kernels run in Triton's interpreter.
        channels: Channels of input and output.
        size: Height and width of the input.
        dtypes: Of the tensors.

    Returns:
        For each dtype, memory format and setting the largest relative error, in the Frobenius norm, of the output and
        the gradients of input, weight, bias and residual: of the "fused" path, and of the "plain" one; "ok" says
        whether the former is at most twice the latter, or twice the precision of the dtype.
    """
    from knlightning.nn.fused_passes import mask_of_seed  # needs Triton

    rows = []
    formats = (torch.channels_last, torch.contiguous_format)
    for dtype, memory_format, training, relu_output in product(dtypes, formats, (True, False), (True, False)):
        torch.manual_seed(0)
        x = torch.randn(2, channels, size, size, device=device).contiguous(memory_format=memory_format)
        weight = torch.randn(channels, channels, 3, 3, device=device) / (3 * channels**0.5)
        tensors = [t.to(dtype) for t in (x, weight, torch.randn(channels, device=device), torch.randn_like(x))]
        direction = torch.randn_like(x).to(dtype)
        torch.manual_seed(1)
        mask = mask_of_seed(draw_seed(x.device), tensors[0], DROPOUT) if training else None
        torch.manual_seed(1)
        fused = _results(tensors, direction, None, training, relu_output, fused=True)
        plain = _results(tensors, direction, mask, training, relu_output, fused=False)
        exact = _results([t.double() for t in tensors], direction, mask, training, relu_output, fused=False)
        row: dict[str, Any] = {
            "dtype": str(dtype).removeprefix("torch."),
            "memory_format": str(memory_format).removeprefix("torch."),
            "training": training,
            "relu_output": relu_output,
        }
        for name, found in (("fused", fused), ("plain", plain)):
            errors = ((a.double() - b).norm() / b.norm() for a, b in zip(found, exact, strict=True))
            row[name] = max(float(error) for error in errors)
        rows.append(row | {"ok": row["fused"] <= 2 * max(row["plain"], torch.finfo(dtype).eps)})
    return rows


def _results(
    tensors: list[Tensor], direction: Tensor, mask: Tensor | None, training: bool, relu_output: bool, fused: bool
) -> list[Tensor]:
    """Return the output and the gradients; a residual only where there is no ReLU behind it."""
    inputs = [t.detach().requires_grad_() for t in (tensors[:3] if relu_output else tensors)]
    x, weight, bias, *residual = inputs
    with fused_kernels(fused):
        output = kn_conv(
            x, weight, bias, padding=1, dropout_p=DROPOUT, training=training, mask=mask,
            relu_input=not relu_output, relu_output=relu_output, residual=residual[0] if residual else None,
        )  # fmt: skip
    return [output.detach(), *torch.autograd.grad(output, inputs, direction.to(output.dtype))]
