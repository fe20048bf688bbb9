"""Private parts of torch; tried with releases 2.9 to 2.14."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode


def function_transforms_active() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is running. Tried with torch 2.14."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def saved_tensors_are_hooked() -> bool:
    """Whether hooks see what autograd saves, as for activation checkpointing. Tried with torch 2.14.1."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FORWARD_PARTS = ("forward", "_conv_forward")


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks of a module are called in its forward or backward pass. Tried with torch 2.14."""
    return any(getattr(module, name) for name in _HOOKS)


def convolves_as(conv: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a convolution computes what its base class in torch does, and nothing else. Tried with torch 2.14.

    Args:
        conv: A convolution, of the base class or of a subclass.
        base: `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, whose `forward` calls `_conv_forward`, or `nn.ConvTranspose1d`,
            `nn.ConvTranspose2d` or `nn.ConvTranspose3d`, which have no such part.
    """
    return all(getattr(type(conv), name, None) is getattr(base, name, None) for name in _FORWARD_PARTS)


# ---- private training


def is_compiled(module: nn.Module) -> bool:
    """Say whether a module was compiled by its own `compile`, or made by `torch.compile`. Tried with torch 2.14.1."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def version_of(tensor: Tensor) -> int:
    """Return a number that grows with each change of a tensor in place. Tried with torch 2.14.1."""
    return tensor._version


def changing_draws(change: Callable[[Tensor], None], of_tensors: bool = False) -> AbstractContextManager[Any]:
    """Show a function each tensor that torch fills with random numbers, to change it in place. Tried with torch 2.14.1.

    Args:
        change: Is called after a draw, before its result is used; not for permutations and `torch.multinomial`.
        of_tensors: Whether draws are shown, too, that depend on the values of a tensor, such as `torch.bernoulli`.
    """
    return _Draws(change, of_tensors)


class _Draws(TorchDispatchMode):
    def __init__(self, change: Callable[[Tensor], None], of_tensors: bool) -> None:
        super().__init__()
        self.change, self.of_tensors = change, of_tensors

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return result
        name = func.overloadpacket.__name__
        if name == "native_dropout":  # on GPUs: the output, and the mask it was made with
            output, mask = result
            self.change(mask)
            output.copy_(args[0] * mask / (1.0 - args[1]))
        elif isinstance(result, Tensor) and name not in ("randperm", "multinomial"):
            values = args[1:] if name.endswith(("_", "_like")) else args
            if self.of_tensors or not any(isinstance(value, Tensor) for value in values):
                self.change(result)
        return result


# ---- processes of a DataLoader

WORKER_HINT = (
    "Often the memory of the machine was exhausted: set num_workers or batch_size lower. If the files come from a slow "
    "disk or network, copy them."
)
"""What to do when a process of a DataLoader has died."""


def worker_message(error: BaseException) -> str | None:
    """Return the message of an error that a process of a DataLoader has raised. Tried with torch 2.14.1.

    Args:
        error: What the DataLoader raises: the same type of error, with the whole traceback as its text.

    Returns:
        The message without the traceback; None if the error is another one.
    """
    text = str(error)
    found = re.match(r"Caught (\w+) in DataLoader worker process \d+\.\nOriginal Traceback", text)
    return text.rpartition(f"{found[1]}: ")[2].strip() or None if found else None


def worker_failure(error: BaseException) -> str | None:
    """Return what happened if a process of a DataLoader has died. Tried with torch 2.14.1.

    Args:
        error: What the DataLoader raises, or its handler of the signal SIGCHLD in whatever runs.
    """
    died = r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (is killed by signal: [^.]+|exited unexpectedly)"
    cause: BaseException | None = error
    while cause is not None:  # what the handler has interrupted may make another error of it
        if isinstance(cause, RuntimeError) and (found := re.match(died, str(cause))):
            return f"A process that reads images has died (number {found[1]} {found[2]})."
        cause = cause.__context__
    return None


def found_too_small(error: RuntimeError) -> bool:
    """Say whether a convolution or a pooling has found its images too small. Tried with torch 2.14.1."""
    return "Output size is too small" in str(error) or "Kernel size can't be greater than actual input" in str(error)


def workers_of(iterator: Any) -> list[Any]:
    """Return the processes of a DataLoader. Tried with torch 2.14.1.

    Args:
        iterator: What `iter` returned for the DataLoader; one without processes will do.
    """
    return list(getattr(iterator, "_workers", []))


def is_loss_of_peer(error: BaseException) -> bool:
    """Say whether processes that work together have lost the connection to one of them. Tried with torch 2.14.1.

    Args:
        error: What a collective operation of gloo or NCCL has raised; that of gloo is a plain RuntimeError.
    """
    text = str(error)
    gloo = isinstance(error, RuntimeError) and ("gloo" in text or "Connection closed by peer" in text)
    return gloo or isinstance(error, torch.distributed.DistBackendError | torch.distributed.DistNetworkError)
