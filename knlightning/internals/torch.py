"""Private parts of torch; tried with releases 2.9 to 2.14."""

import torch
from torch import Tensor, nn


def function_transforms_active() -> bool:
    """Whether a transform of `torch.func` such as `vmap` or `grad` is running. Tried with torch 2.14."""
    return torch._C._are_functorch_transforms_active()


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FORWARD_PARTS = ("forward", "_conv_forward")


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks of a module are called in its forward or backward pass. Tried with torch 2.14."""
    return any(getattr(module, name) for name in _HOOKS)


def convolves_as(conv: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a convolution computes what its base class in torch does, and nothing else. Tried with torch 2.14.

    Args:
        conv: A convolution, of the base class or of a subclass.
        base: `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, whose `forward` calls `_conv_forward`.
    """
    return all(getattr(type(conv), name) is getattr(base, name) for name in _FORWARD_PARTS)


# ---- private training


def is_compiled(module: nn.Module) -> bool:
    """Say whether `nn.Module.compile` was called on a module itself. Tried with torch 2.14.1."""
    return module._compiled_call_impl is not None


def version_of(tensor: Tensor) -> int:
    """Return a number that grows with each change of a tensor in place. Tried with torch 2.14.1."""
    return tensor._version
