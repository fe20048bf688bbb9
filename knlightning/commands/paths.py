"""Paths on a command line and in configurations: what they mean, wherever they come from."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

PATH_NAME = re.compile(r"(^|_)(to|out|root|folder|file|path|dir|dirpath|directory|config|runs|from)$")
"""Names of arguments that are paths."""


def expanded(path: str) -> str:
    """Replace `~` and variables such as `$SCRATCH` in a path.

    Args:
        path: The path; one that exists as it is written stays so.

    Raises:
        ValueError: If there is no such variable or user.
    """
    if ("$" not in path and not path.startswith("~")) or os.path.exists(path):
        return path

    def value(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(2)
        if name not in os.environ:
            raise ValueError(f"{path}: there is no environment variable {name}")
        return os.environ[name]

    home = os.path.expanduser(path)
    if home.startswith("~"):
        raise ValueError(f"{path}: there is no such user; a folder of this name is ./{path}")
    return re.sub(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", value, home)


def expand_paths(config: Any) -> None:
    """Expand all paths in a configuration, in place, wherever they come from.

    Args:
        config: Nested namespaces, dictionaries and lists. Paths are known by the names of arguments.
    """
    if isinstance(config, list):
        for inner in config:
            expand_paths(inner)
    items = vars(config) if isinstance(config, Namespace) else config
    if not isinstance(items, dict):
        return
    for name, value in items.items():
        if isinstance(value, str | Path) and isinstance(name, str) and PATH_NAME.search(name):
            items[name] = type(value)(expanded(str(value)))
        elif isinstance(value, list) and isinstance(name, str) and PATH_NAME.search(name):
            items[name] = [type(v)(expanded(str(v))) if isinstance(v, str | Path) else v for v in value]
        else:
            expand_paths(value)


def config_first(args: Sequence[str]) -> list[str]:
    """Order a command line so that its other arguments take precedence over configuration files.

    Args:
        args: The command line. Of configurations the later ones take precedence, of other arguments as well.

    Returns:
        The same, with `--config` first.
    """
    configs: list[str] = []
    others: list[str] = []
    rest = list(args)
    while rest:
        name, equals, file = rest.pop(0).partition("=")
        if name not in ("--config", "-c") or not (equals or rest):
            others.append(name + equals + file)
            continue
        configs.append(f"--config={expanded(file if equals else rest.pop(0))}")
    return configs + others
