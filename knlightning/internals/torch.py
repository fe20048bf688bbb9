"""Private parts of torch."""

import torch


def function_transforms_active() -> bool:
    """Whether a transform of `torch.func` such as `vmap` or `grad` is running. Tried with torch 2.14."""
    return torch._C._are_functorch_transforms_active()
