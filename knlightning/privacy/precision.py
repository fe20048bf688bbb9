"""Products of float32 matrices in full float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_BACKENDS: tuple[Any, ...] = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,  # type: ignore[attr-defined] # missing in torch's stubs, as the next ones
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
)


@contextmanager
def full_float32() -> Iterator[None]:
    """Keep torch from rounding the factors of float32 products to TF32 or bfloat16, whatever its settings are.

    With cuDNN it does so in convolutions by default, and in matrix products after
    `torch.set_float32_matmul_precision("high")` or `"medium"`. A sum of gradients then differs from the gradients whose
    norms were taken, by more than what is allowed for rounding.
    """
    before = [backend.fp32_precision for backend in _BACKENDS]
    try:
        for backend in _BACKENDS:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(_BACKENDS, before, strict=True):
            backend.fp32_precision = precision
