"""What is used of jsonargparse that is not documented. Tried with release 4.53."""

from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from jsonargparse import ArgumentParser
from jsonargparse._typehints import ActionTypeHint

_listed = ActionTypeHint.extra_help


def set_titles(parser: ArgumentParser, titles: Mapping[str, str]) -> None:
    """Set the titles of groups of arguments, which otherwise repeat the docstring of their class.

    `ArgumentParser.groups` is not documented. Tried with jsonargparse 4.53.

    Args:
        parser: The parser.
        titles: Titles by the keys of the groups.
    """
    groups = parser.groups or {}
    for key, title in titles.items():
        groups[key].title = title


def made_by(frame: FrameType) -> tuple[Callable[..., Any], dict[str, Any]] | None:
    """Return what makes an object of a configuration in a frame of a traceback, and with which arguments.

    It is a class or a function. Optimizers and schedules pass the same frame, though they are made later. The function
    `default_class_instantiator` and its parameters are not documented. Tried with jsonargparse 4.53.

    Args:
        frame: The frame.

    Returns:
        Class or function, and its arguments; None if it is another frame.
    """
    if frame.f_code.co_name != "default_class_instantiator":
        return None
    return frame.f_locals["class_type"], frame.f_locals["kwargs"]


def set_choices(texts: Mapping[type, str]) -> None:
    """Let the help of arguments name choices of ours in place of every class that is imported.

    `ActionTypeHint.extra_help` is not documented. Tried with jsonargparse 4.53.

    Args:
        texts: By the type of an argument, what stands in its help.
    """

    def extra_help(self: ActionTypeHint) -> str:
        return f", {texts[self._typehint]}" if self._typehint in texts else _listed(self)

    setattr(ActionTypeHint, "extra_help", extra_help)  # noqa: B010 # mypy refuses the assignment to a method
