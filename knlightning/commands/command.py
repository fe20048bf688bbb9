"""Functions as commands: their parameters are the arguments, and wrong ones are answered with a message."""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser

from knlightning.checks import ArgumentError
from knlightning.commands.arguments import find_argument, plain_errors
from knlightning.commands.paths import config_first, expand_paths
from knlightning.commands.yaml_text import NamesFiles, read_yaml_strictly


class CommandArgumentParser(NamesFiles, ArgumentParser):
    """ArgumentParser whose errors name the file."""


def command(function: Callable[..., object], prog: str, args: Sequence[str] | None = None) -> None:
    """Call a function with the arguments of a command line.

    Args:
        function: Its parameters are the arguments. Two are special: `overrides`, if it has that, is a dictionary of all
            arguments with a dot in their name; if it has no `config`, `--config FILE` reads arguments from a file.
        prog: Name of the command.
        args: Command line without the name of the program; None for that of the process.

    Raises:
        SystemExit: If an argument is wrong, with status 2; if interrupted, with status 130.
    """
    read_yaml_strictly()
    args = sys.argv[1:] if args is None else args
    parameters = inspect.signature(function).parameters
    description = (function.__doc__ or "").partition("Args:")[0]
    parser = CommandArgumentParser(
        prog=prog, description=description, usage=f"{prog} [--key value ...]", allow_abbrev=False
    )
    if "config" not in parameters:
        parser.add_argument("--config", action="config", help="File with arguments of this command, in YAML.")
    parser.add_function_arguments(function, as_group=False, skip={"overrides"})
    with plain_errors(prog):
        given: dict[str, Any] = {}
        if "overrides" in parameters:
            args, given["overrides"] = split_settings(args)
        parsed = parser.parse_args(args if "config" in parameters else config_first(args))
        expand_paths(parsed)
        parsed = parser.instantiate(parsed)
        given |= {name: parsed[name] for name in parameters if name in parsed}
        try:
            function(**given)
        except ArgumentError as error:
            raise find_argument(error, given) from error
        except SystemExit as end:
            if end.code == 130:  # so ends a run that is interrupted
                from knlightning.commands.output import say  # here: it imports Lightning

                say("The same command again goes on where it was.")
            raise


def split_settings(args: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Split a command line into arguments of the command itself and settings for the runs it starts.

    The latter are the ones with a dot in their names, such as `--trainer.max_epochs 1` or `--data.root=data`.

    Args:
        args: Command line without the name of the program.

    Returns:
        The former as they are, and the latter by name.

    Raises:
        ValueError: If a setting has no value.
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
