"""The command `knl`: finds the command that is asked for, and runs it."""

import ast
import atexit
import gc
import os
import re
import shlex
import signal
import sys
import threading
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from types import FrameType
from typing import Any

from knlightning import commands
from knlightning.commands.arguments import plain_errors
from knlightning.commands.early import USAGES, check_early, print_help

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
        module, text = list_commands()[name]
        if name in USAGES and args[1:] in (["--help"], ["-h"]):
            print_help(name, text)
            return
        if args[2:] == ["all"] and args[1] in ("--help", "-h"):
            args = args[:2]
        check_early(name, args[1:])
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # a configuration may name classes in files that lie here
        try:
            with plain_errors(f"knl {name}"):
                _import(f"{commands.__name__}.{module}").main(args[1:])
            return
        except SystemExit as end:
            status = end.code
        # outside the handler, where the error has let the trainer go: torch may abort if it goes with the interpreter
        atexit.unregister(gc.collect)
        atexit.register(gc.collect)
        raise SystemExit(status)


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


def _import(module: str) -> Any:
    """Import a command without a search for garbage in what it imports, which takes long, also later."""
    if module in sys.modules or not gc.isenabled():
        return import_module(module)
    gc.disable()
    try:
        with _interrupted_at_once():
            return import_module(module)
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # as without it, or torch may abort when a process with threads ends
        gc.enable()


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


def _scan() -> Iterator[tuple[str, str]]:
    for module in iter_modules(commands.__path__):
        spec = find_spec(f"{commands.__name__}.{module.name}")
        if module.name == "main" or spec is None or spec.origin is None:
            continue
        has_main, text = _outline(spec.origin)
        if has_main:
            yield module.name, text


@cache
def _outline(path: str) -> tuple[bool, str]:
    """Say whether a file defines `main`, and return the first line of its docstring, without importing it."""
    source = Path(path).read_text(encoding="utf-8")
    has_main = re.search(r"^(def main\(|main = )", source, re.MULTILINE) is not None
    return has_main, (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


if __name__ == "__main__":
    main()
