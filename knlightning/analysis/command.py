"""Functions as commands: their parameters are the arguments, and wrong ones are answered with a message."""

import inspect
import sys
from collections.abc import Callable, Sequence

from jsonargparse import ArgumentParser
from lightning.pytorch.utilities import rank_zero_only

from knlightning.cli import plain_errors


def command(function: Callable[..., object], prog: str, args: Sequence[str] | None) -> None:
    """Call a function with the arguments of a command line.

    Args:
        function: its parameters are the arguments, but for `overrides`, if it has that: a dictionary of all arguments
            with a dot in their name.
        prog: name of the command.
        args: command line without the name of the program; None for that of the process.

    Raises:
        SystemExit: with status 2 if an argument is wrong, 130 if interrupted.
    """
    args = sys.argv[1:] if args is None else args
    description = (function.__doc__ or "").partition("Args:")[0]
    parser = ArgumentParser(prog=prog, description=description, usage=f"{prog} [--key value ...]")
    parser.add_function_arguments(function, as_group=False, skip={"overrides"})
    with plain_errors(prog):
        if "overrides" not in inspect.signature(function).parameters:
            function(**parser.parse_args(args))
            return
        own, overrides = split_settings(args)
        try:
            function(**parser.parse_args(own), overrides=overrides)
        except SystemExit as end:
            if end.code == 130:  # so ends a run that is interrupted
                rank_zero_only(print)("The same command again goes on where it was.")
            raise


def split_settings(args: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Part a command line into the arguments of the command itself and settings for the runs it starts.

    The latter are the ones with a dot in their names, such as `--trainer.max_epochs 1` or `--data.root=data`.

    Args:
        args: command line without the name of the program.

    Returns:
        The former as they are, and the latter by name.

    Raises:
        ValueError: A setting has no value.
    """
    own: list[str] = []
    settings: dict[str, str] = {}
    rest = list(args)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not (name.startswith("--") and "." in name):
            own.append(name + equals + value)
        elif equals:
            settings[name[2:]] = value
        elif rest:
            settings[name[2:]] = rest.pop(0)
        else:
            raise ValueError(f"{name} needs a value")
    return own, settings
