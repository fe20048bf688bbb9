"""What may have been meant by a name that is not known."""

import inspect
import re
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from pkgutil import resolve_name

from jsonargparse import ArgumentParser

from knlightning.internals.jsonargparse import options_of

NOT_ACCEPTED = re.compile(r"(?P<key>[\w.]+): class_path '(?P<path>[\w.]+)': Option '(?P<name>[\w.]+)' is not accepted")
NOT_TAKEN = re.compile(r"^(?P<key>[\w.]+): .* Option '(?P<name>[\w.]+)' is not .*\(class_path='(?P<path>[\w.]+)'")
"""The same of what is made later, such as an optimizer."""
UNKNOWN = re.compile(r"(?:unrecognized arguments: --|does not accept option '|^Option ')([\w.]+)")
GROUP = re.compile(r"^Group '([\w.]+)' ")
ONE_OF = re.compile(r"must be one of (.*); got (\w+)$")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Name what is known and much like a name; empty if there is nothing."""
    found = get_close_matches(name, list(known), n=1, cutoff=0.75)
    return f" Did you mean {found[0]}?" if found else ""


def explained(message: str, parser: ArgumentParser) -> str:
    """Say what may have been meant where a parser does not know an option or a word.

    Args:
        message: Message of the parser, in one line.
        parser: The parser.

    Returns:
        The message, with a hint if there is one.
    """
    if found := NOT_ACCEPTED.search(message) or NOT_TAKEN.search(message):
        key, path, name = found["key"], found["path"], found["name"]
        kind = path.rpartition(".")[2]
        return f"{key}.{name}: {kind} has no such argument.{did_you_mean(name, _arguments(path))}"
    if found := UNKNOWN.search(message):
        group = GROUP.search(message)
        name = f"{group[1]}.{found[1]}" if group else found[1]
        options = options_of(parser)
        first, dot, rest = name.partition(".")
        firsts = get_close_matches(first, {option.partition(".")[0] for option in options}, n=1, cutoff=0.75)
        known = options | {head + dot + rest for head in firsts if head != first}
        return f"there is no option {name}.{did_you_mean(name, known)}"
    if found := ONE_OF.search(message):
        meant = did_you_mean(found[2], re.findall(r"\w+", found[1]))
        return f"{message}.{meant}" if meant else message
    return message


def _arguments(path: str) -> set[str]:
    """Name the arguments of a class or function, with those that a class passes on to its bases."""
    with suppress(ImportError, AttributeError, ValueError, TypeError):
        made = resolve_name(path)
        makers = [vars(base).get("__init__") for base in made.__mro__] if isinstance(made, type) else [made]
        return {name for maker in makers if maker for name in inspect.signature(maker).parameters} - {
            "self",
            "args",
            "kwargs",
        }
    return set()
