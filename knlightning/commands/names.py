"""Short names of what this package has: `knresnet18` for `knlightning.models.knresnet18`."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any

from knlightning.commands.hints import did_you_mean

PACKAGES = ("tasks", "data", "models", "callbacks", "privacy")
LIBRARIES = ("lightning.pytorch.callbacks", "torch.optim", "torch.optim.lr_scheduler")
TAKES_NAME = re.compile(r"(^|\.)(model|data|backbone|optimizer|lr_scheduler|callbacks|help|class_path)\+?$")
"""Arguments whose values are names of classes and functions."""


@cache
def short_names() -> Mapping[str, str]:
    """Map what the user can name in a configuration to where it lies."""
    package = __name__.partition(".")[0]
    folders = {name: import_module(f"{package}.{name}") for name in PACKAGES}
    models = {model.name: model.make.__module__ for model in folders["models"].list_models()}
    names = {name: module for name, module in models.items() if not hasattr(folders["models"], name)}
    for folder in folders.values():
        names |= {
            name: folder.__name__
            for name in folder.__all__
            if name in models or (folder is not folders["models"] and isinstance(getattr(folder, name), type))
        }
    return {name: f"{module}.{name}" for name, module in names.items()}


@cache
def known_names() -> Mapping[str, str]:
    """Map short names to where they lie: those of this package, and classes of `LIBRARIES`."""
    classes = ((path, name) for path in LIBRARIES for name in import_module(path).__all__ if name[0].isupper())
    return {name: f"{path}.{name}" for path, name in classes} | dict(short_names())


def complete_names(args: Sequence[str]) -> list[str]:
    """Replace short names on a command line.

    Args:
        args: The command line.

    Returns:
        The same with `--data DigitsDataModule` as `--data knlightning.data.DigitsDataModule`, and so on.

    Raises:
        ValueError: If a name is not known but much like one that is.
    """
    completed: list[str] = []
    takes_name = ""
    for arg in args:
        name, equals, value = arg.partition("=")
        if takes_name and not arg.startswith("--"):
            arg = _complete(arg, takes_name)
        elif equals and TAKES_NAME.search(name.lstrip("-")):
            arg = f"{name}={_complete(value, name)}"
        takes_name = arg if arg.startswith("--") and not equals and TAKES_NAME.search(arg[2:]) else ""
        completed.append(arg)
    return completed


def complete_class_paths(config: Any) -> Any:
    """Replace short names that stand as `class_path` in what a configuration file holds, in place.

    Args:
        config: Nested dictionaries and lists.

    Returns:
        The same object.
    """
    for value in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        complete_class_paths(value)
    if isinstance(config, dict) and isinstance(config.get("class_path"), str):
        config["class_path"] = _complete(config["class_path"], "class_path")
    return config


def _complete(name: str, key: str) -> str:
    known = known_names()
    if not name.isidentifier() or name in known:
        return known.get(name, name)
    if hint := did_you_mean(name, list(known)):
        raise ValueError(f"{key}: there is no {name}.{hint} knl list shows what there is.")
    return name
