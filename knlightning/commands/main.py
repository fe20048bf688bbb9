"""The command `knl`: finds the command that is asked for, and runs it."""

import ast
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from knlightning import commands

FIRST = ("fit", "validate", "test", "predict")
"""Commands at the head of the list; the others follow by their names."""


def list_commands() -> dict[str, tuple[str, str]]:
    """Find the commands, without importing them.

    Returns:
        For each command its module, and the first line of its docstring.
    """
    found = {name.replace("_", "-"): (name, text) for name, text in _scan()}
    return {name: found[name] for name in (*FIRST, *sorted(found.keys() - set(FIRST)))}


def run(args: list[str]) -> Any:
    """Run a command; its errors are raised.

    Args:
        args: Command line without the name of the program.

    Returns:
        What the command returns: for `fit`, `validate`, `test` and `predict` the command line interface, with
        `trainer`, `model` and `datamodule`.

    Raises:
        SystemExit: If there is no such command, with status 2.
    """
    module = list_commands()[_choose(args)][0]
    return import_module(f"{commands.__name__}.{module}").main(args[1:])


def main(args: list[str] | None = None) -> None:
    """Run the command `knl`.

    Args:
        args: Command line without the name of the program; None for that of the process.

    Raises:
        SystemExit: If the configuration or the data are at fault, with status 2; if interrupted, with status 130.
    """
    args = sys.argv[1:] if args is None else args
    name = _choose(args)
    from knlightning.commands.arguments import plain_errors  # here: the list of commands does without Lightning

    with plain_errors(f"knl {name}"):
        run(args)


def _choose(args: list[str]) -> str:
    parser = ArgumentParser(prog="knl", description="Train kernel normalized networks, and use them.")
    subparsers = parser.add_subparsers(title="commands", dest="command", required=True)
    for name, (_, text) in list_commands().items():
        subparsers.add_parser(name, help=text.replace("%", "%%"), add_help=False)
    return str(parser.parse_args(args[:1]).command)


def _scan() -> Iterator[tuple[str, str]]:
    for module in iter_modules(commands.__path__):
        spec = find_spec(f"{commands.__name__}.{module.name}")
        if module.name == "main" or spec is None or spec.origin is None:
            continue
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            yield module.name, (ast.get_docstring(tree) or "").partition("\n")[0]


if __name__ == "__main__":
    main()
