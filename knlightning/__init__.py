"""Kernel normalized convolutional networks in PyTorch Lightning.

`import knlightning` imports nothing else. The folders of the package, such as `knlightning.nn`, and `knlightning.load`
are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knlightning.loading import load as load

__version__ = "0.1.0"

FOLDERS = ("analysis", "callbacks", "data", "export", "models", "nn", "privacy", "tasks")


def __getattr__(name: str) -> Any:
    if name == "load":
        return import_module(f"{__name__}.loading").load
    if name in FOLDERS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *FOLDERS, "load"])
