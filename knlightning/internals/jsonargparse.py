"""What is used of jsonargparse that is not documented. Tried with release 4.53."""

import re
from collections.abc import Callable, Mapping
from itertools import takewhile
from types import FrameType
from typing import Any

from jsonargparse import ArgumentParser
from jsonargparse._typehints import ActionTypeHint

_listed = ActionTypeHint.extra_help


def set_titles(parser: ArgumentParser, titles: Mapping[str, str]) -> None:
    """Set the titles of groups of arguments, which otherwise repeat the docstring of their class.

    `ArgumentParser.groups` is not documented. Tried with jsonargparse 4.53.
    """
    groups = parser.groups or {}
    for key, title in titles.items():
        groups[key].title = title


def made_by(frame: FrameType) -> tuple[Callable[..., Any], dict[str, Any]] | None:
    """Return what makes an object of a configuration in a frame of a traceback, and with which arguments.

    It is a class or a function. Optimizers and schedules pass the same frame, though they are made later. The function
    `default_class_instantiator` and its parameters are not documented. Tried with jsonargparse 4.53.

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


_KEY = re.compile(r'Parser key "([^"]+)"')
_NAMES = (
    (r"<class 'NoneType'>", "null"),
    (r"<class '(?:\w+\.)*(\w+)'>", r"\1"),
    (r"typing\.Literal\[([^\]]*)\]", r"\1"),
    (r"\b(?:\w+\.)+(?=[A-Z]\w*)", ""),
)
"""How types are written in messages, and how they are meant."""


def in_one_line(message: str) -> str:
    """Bring a message of a parser, about a value that does not fit its key, into one line.

    The form of these messages is not documented. Tried with jsonargparse 4.53.

    Args:
        message: The message, with a line for each type that was tried.

    Returns:
        The full key, what is allowed there, and the value; the message as it is if it has another form.
    """
    lines = message.splitlines()
    keys: list[str] = []
    depth, place = -1, 0
    for number, line in enumerate(lines):
        found, indentation = _KEY.search(line), len(line) - len(line.lstrip())
        if found and indentation > depth:
            keys.append(found[1])
            depth, place = indentation, number
    if not keys or len(lines) < 2:
        return message
    inner = takewhile(lambda line: not line or len(line) - len(line.lstrip()) > depth, lines[place + 1 :])
    key, reasons = ".init_args.".join(keys), [line.strip().removeprefix("- ") for line in inner if line]
    problem = next((n for n, reason in enumerate(reasons) if reason.startswith("Problem with given class_path")), None)
    if problem is not None:
        return f"{key}: {reasons[problem].removeprefix('Problem with given ')} {reasons[problem + 1]}"
    text = "\n".join(reasons)
    union, single = r"^Subtypes: \[(.*)\]$", r"^Expected an? (.*?)\. Got value: "
    expected = re.search(union, text, re.M) or re.search(single, text, re.M)
    given = re.search(r"(?:^Given value: |\. Got value: )(.*)", text, re.M)
    if expected is None or given is None:
        return f"{key}: {(reasons or lines)[-1].strip()}"
    allowed = ("one of " if "," in expected[1] else "") + expected[1]
    for written, meant in _NAMES:
        allowed = re.sub(written, meant, allowed)
    ours = [reason for reason in reasons if reason.startswith("Not of type")]  # a type that this project has registered
    hint = f" ({ours[0].partition(': ')[2]})" if ours else ""
    return f"{key} must be {allowed}; got {given[1].partition('. Got value: ')[0]:.100}{hint}"


def options_of(parser: ArgumentParser) -> set[str]:
    """Return the names of all options of a parser, without the dashes.

    `ArgumentParser._actions`, which is argparse's, is not documented. Tried with jsonargparse 4.53 and Python 3.11.
    """
    return {action.dest for action in parser._actions}
