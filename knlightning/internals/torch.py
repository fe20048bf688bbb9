"""What the package uses of torch that is not public."""

from torch import Tensor, nn

# ---- private training


def is_compiled(module: nn.Module) -> bool:
    """Say whether `nn.Module.compile` was called on a module itself. Tried with torch 2.14.1."""
    return module._compiled_call_impl is not None


def version_of(tensor: Tensor) -> int:
    """Return a number that grows with each change of a tensor in place. Tried with torch 2.14.1."""
    return tensor._version
