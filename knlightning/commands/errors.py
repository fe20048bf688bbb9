"""Which key of a configuration an error comes from."""

import linecache
import re
from collections.abc import Iterator
from contextlib import suppress
from pkgutil import resolve_name
from traceback import walk_tb
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from knlightning.callbacks import CONFIGURED
from knlightning.checks import ArgumentError
from knlightning.commands.arguments import find_argument, walk
from knlightning.internals.jsonargparse import made_by

PACKAGE = __name__.partition(".")[0]
LIBRARIES = ("lightning", "torch")
"""What optimizers, schedules and callbacks call; code of others, such as a training step, is not theirs."""
LONGEST_VALUE = 100
"""Number of characters after which the values in a message are cut."""


def locate(error: Exception, config: dict[str, Any]) -> Exception:
    """Complete an error with the key of the configuration that it comes from.

    It comes from the configuration if it is an `ArgumentError`; if it is raised while an object of the configuration
    is made, at once or (an optimizer) later; or if the code of an optimizer, a schedule or a callback raises it that
    the configuration takes from another library.

    Args:
        error: The error, with those that caused it.
        config: The configuration, as nested dictionaries.

    Returns:
        A ValueError that names the key; the error as it is if it does not come from the configuration.
    """
    for cause in (causes := list(_causes(error))):
        if isinstance(cause, ArgumentError):
            return find_argument(cause, config)
    for cause in causes:
        frames = [frame for frame, _ in walk_tb(cause.__traceback__)]
        for depth, frame in reversed(list(enumerate(frames))):
            made = (Trainer, config["trainer"]) if _makes_trainer(frame) else made_by(frame)
            if made is not None:
                return _explained(cause, made[0], made[1], frames[depth + 1 :], config)
        owner = _owner(frames)
        if owner is not None and any(made is type(owner) for _, _, made, _ in _objects(config)):
            return _explained(cause, type(owner), {}, [], config)
    return error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """List the first cause of an error, what it has caused, ..., and the error itself."""
    if error is not None:
        yield from _causes(error.__cause__)
        yield error


def _makes_trainer(frame: FrameType) -> bool:
    return frame.f_code.co_name == "__init__" and isinstance(frame.f_locals.get("self"), Trainer)


def _owner(frames: list[FrameType]) -> Optimizer | LRScheduler | Callback | None:
    """Find the optimizer, schedule or callback whose code has raised an error; not that of a network within it."""
    for frame in reversed(frames):
        owner = frame.f_locals.get("self")
        if isinstance(owner, Optimizer | LRScheduler | Callback) and _package(type(owner).__module__) != PACKAGE:
            return owner
        if isinstance(owner, nn.Module) or _package(frame.f_globals.get("__name__", "")) not in LIBRARIES:
            return None
    return None


def _package(module: str) -> str:
    return module.partition(".")[0]


def _objects(config: dict[str, Any]) -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
    """List the objects of a configuration: key, key of the arguments, class or function, arguments."""
    for key, value in walk(config):
        if isinstance(value, dict) and isinstance(value.get("class_path"), str):
            with suppress(ImportError, AttributeError, ValueError):
                yield key, f"{key}.init_args", resolve_name(value["class_path"]), value.get("init_args") or {}
    for key, made in {**{key: made for key, (made, _) in CONFIGURED.items()}, "trainer": Trainer}.items():
        yield key, key, made, config.get(key) or {}


def _explained(
    error: BaseException, made: Any, arguments: dict[str, Any], frames: list[FrameType], config: dict[str, Any]
) -> ValueError:
    """Say which arguments of which object an error comes from.

    Args:
        error: The error.
        made: Class or function that makes the object.
        arguments: Its arguments.
        frames: The frames of the traceback within it.
        config: The configuration.
    """
    same = [place for place in _objects(config) if place[2] is made]
    alike = [place for place in same if all(place[3].get(k, v) == v for k, v in arguments.items() if _is_plain(v))]
    names = _guilty(str(error), {name: value for name, value in arguments.items() if _is_plain(value)}, frames)
    places = alike or same or [(name := getattr(made, "__name__", str(made)), name, made, {})]
    where = " or ".join(f"{prefix}.{name}" for _, prefix, _, _ in places for name in names)
    where = where or " or ".join(key for key, _, _, _ in places)
    name = f"{made.__module__}.{made.__qualname__}"
    values = ", ".join(f"{name}={arguments[name]!r:.{LONGEST_VALUE}}" for name in names)
    reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}".rstrip(": ")
    return ValueError(f"{where}: {name} fails{' with ' * bool(values)}{values}: {reason}")


def _guilty(message: str, arguments: dict[str, Any], frames: list[FrameType]) -> list[str]:
    """Find the arguments that an error is about.

    Args:
        message: Message of the error, which may name them.
        arguments: Plain arguments of the object that was made.
        frames: The frames of the traceback within. Otherwise it is the innermost line of code that names an argument.
    """
    texts = [message]
    for frame in reversed(frames):
        texts.append(linecache.getline(frame.f_code.co_filename, frame.f_lineno))
    for text in texts:
        for end in ("=", r"\b"):  # `devices=0` says more than the word alone
            named = [name for name in arguments if re.search(rf"\b{re.escape(name)}{end}", text)]
            if named:
                return named
    return []


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | tuple | dict)
