"""The command `knl`: finds the command that is asked for, and runs it."""

import ast
import os
import shlex
import signal
import sys
import threading
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from types import FrameType
from typing import Any

from knlightning import commands
from knlightning.commands.arguments import plain_errors

FIRST = ("fit", "validate", "test", "predict")
"""Commands at the head of the list; the others follow by their names."""


def list_commands() -> dict[str, tuple[str, str]]:
    """Find the commands, without importing them.

    Returns:
        For each command its module, and the first line of its docstring.
    """
    found = {name.replace("_", "-"): (name, text) for name, text in _scan()}
    return {name: found[name] for name in (*FIRST, *sorted(found.keys() - set(FIRST)))}


def run(args: list[str] | str) -> Any:
    """Run a command, as from a notebook; its errors are raised.

    Args:
        args: Command line without the name of the program, as a shell would split it or in one string.

    Returns:
        What the command returns: for `fit`, `validate`, `test` and `predict` the command line interface, with
        `trainer`, `model` and `datamodule`.

    Raises:
        SystemExit: If there is no such command, with status 2.
    """
    args = shlex.split(args) if isinstance(args, str) else args
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
    with _plain_ends():
        name = _choose(args)
        _check_configurations(name, args[1:])
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # a configuration may name classes in files that lie here
        with plain_errors(f"knl {name}"):
            with _interrupted_at_once():
                command = import_module(f"{commands.__name__}.{list_commands()[name][0]}")
            command.main(args[1:])


@contextmanager
def _plain_ends() -> Iterator[None]:
    """Let an interrupt, and the end of whoever reads the output, end the process by a line."""
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # as in `knl list | head -1`
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)  # else what is still to be written would be an error at the end
        with suppress(OSError):
            print("The output is read by nobody any more: ended.", file=sys.stderr)
        raise SystemExit(128 + signal.SIGPIPE) from None


@contextmanager
def _interrupted_at_once() -> Iterator[None]:
    """Let an interrupt end the process while it imports libraries, which make other errors of it."""

    def end(signum: int, frame: FrameType | None) -> None:
        os.write(2, b"Interrupted.\n")
        os._exit(128 + signum)

    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _choose(args: list[str]) -> str:
    parser = ArgumentParser(prog="knl", description="Train kernel normalized networks, and use them.")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="command", required=True)
    for name, (_, text) in list_commands().items():
        subparsers.add_parser(name, help=text.replace("%", "%%"), add_help=False)
    if not args:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    if (meant := get_close_matches(args[0], list_commands(), n=1)) and meant[0] != args[0]:
        parser.error(f"there is no command {args[0]}. Did you mean {meant[0]}?")
    return str(parser.parse_args(args[:1]).command)


def _check_configurations(command: str, args: list[str]) -> None:
    """Look for the configuration files of a command line before libraries are imported, which takes seconds.

    Raises:
        SystemExit: If there is no such file, with status 2.
    """
    for place, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        path = value if equals else "".join(args[place + 1 : place + 2])
        if name not in ("--config", "-c") or not path.endswith((".yaml", ".yml")) or "$" in path:
            continue
        if not os.path.exists(os.path.expanduser(path)):
            there = {file.name: str(file) for folder in (Path(), Path("configs")) for file in folder.glob("*.yaml")}
            meant = get_close_matches(Path(path).name, there, n=1)
            hint = f" Did you mean {there[meant[0]]}?" if meant else ""
            print(f"knl {command}: error: --config {path}: there is no such file.{hint}", file=sys.stderr)
            raise SystemExit(2)


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
