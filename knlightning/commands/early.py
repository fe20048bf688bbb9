"""What can be said of a command line before Lightning is imported, which takes seconds."""

import ast
import os
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import yaml

USAGES = {
    "fit": "--config FILE [--key value ...]",
    "validate": "--config FILE --ckpt_path best [--out DIRECTORY] [--key value ...]",
    "test": "--config FILE --ckpt_path best [--out DIRECTORY] [--key value ...]",
    "predict": "--config FILE --ckpt_path best --data.predict_dir FOLDER_OR_IMAGE [--out DIRECTORY] [--key value ...]",
}
"""The commands whose options are known here, and their most important ones."""
OPTIONS = {
    "config": "Configuration in YAML; of several, and of options behind them, the later ones count.",
    "run_dir": "Directory of the run; null for runs/<name of the config file>/<number>.",
    "ckpt_path": (
        "Checkpoint to start from: 'last' or 'best' of the run (the newest, if run_dir is not given), a file, or the"
        " name of published weights. knl fit also knows 'auto': as 'last' if there is one, else a new run."
    ),
    "seed_everything": "Seed of all random numbers; true for any, false for none.",
    "model": "Task and network (knl fit --model.help ClassificationTask, or SegmentationTask)",
    "data": "Data (knl fit --data.help DigitsDataModule)",
    "trainer": "Lightning's trainer",
}
"""Options of every run, or groups of them; further groups are those of `knlightning.callbacks.CONFIGURED`."""


def check_early(command: str, args: list[str]) -> None:
    """Look for configuration files that are not there, and for options and keys that do not exist.

    Args:
        command: Name of the command.
        args: The command line behind it.

    Raises:
        SystemExit: If there is one, with status 2. What is not told here is told when the command line is parsed.
    """
    for path in _configurations(args):
        if not path.exists() or path.is_dir():
            there = {file.name: str(file) for folder in (Path(), Path("configs")) for file in folder.glob("*.yaml")}
            meant = [there[name] for name in get_close_matches(path.name, there, n=1)]
            meant = [str(run) for run in (path / "config.yaml",) if run.is_file()] or meant
            hint = f" Did you mean {meant[0]}?" if meant else ""
            _end(command, f"--config {path}: {'this is a folder' if path.is_dir() else 'there is no such file'}.{hint}")
        for key in _keys(path) if command in USAGES else ():
            if wrong := unknown(key):
                _end(command, f"{path}: {wrong}")
    if command in USAGES and (not args or not args[0].startswith("-")):
        what = f"--config stands before {args[0]}" if args else "there is no configuration, which has a model and data"
        _end(command, f"{what}: knl {command} {USAGES[command]}")
    for name in [arg.partition("=")[0] for arg in args if arg[:2] == "--" != arg] if command in USAGES else ():
        if wrong := unknown(name[2:].rstrip("+")):
            _end(command, wrong)


def print_help(command: str, text: str) -> None:
    """Print the most important options of a command, and the groups of the others.

    Args:
        command: One of `USAGES`.
        text: What it does.
    """
    usage = f"usage: knl {command} {USAGES[command]}"
    print(f"{textwrap.fill(usage, subsequent_indent=' ' * 8, width=79)}\n\n{text}\n")
    for name, said in {**OPTIONS, **_groups()}.items():
        print(textwrap.fill(said, initial_indent=f"  --{name:20}", subsequent_indent=" " * 24, width=79))
    print("\nAn argument of one of them has a dot, such as --trainer.max_epochs 3 or --data.batch_size 8.")
    print(f"Every option, with its values: knl {command} --help all. What can be named: knl list.")


def unknown(name: str) -> str:
    """Say that there is no such option, and which may have been meant; empty if there may be one.

    Args:
        name: Name of the option, without dashes.
    """
    first, _, rest = name.partition(".")
    known = {*OPTIONS, *_groups(), "help", "out", "print_config"}
    if first in known and (first != "trainer" or not rest):
        return ""
    trainer = trainer_arguments()
    if first == "trainer" and (not trainer or rest.partition(".")[0] in trainer):
        return ""
    if not rest:
        hint = "Arguments of model, data and trainer are named as in data.batch_size."
        meant = [f"trainer.{name}"] if name in trainer else get_close_matches(name, known, n=1, cutoff=0.75)
    else:
        hint = ""
        possible = [*(f"trainer.{each}" for each in trainer), *(f"{each}.{rest}" for each in known - {"trainer"})]
        meant = get_close_matches(name, possible, n=1, cutoff=0.75)
    return f"there is no option {name}. {f'Did you mean {meant[0]}?' if meant else hint}".rstrip()


@cache
def trainer_arguments() -> frozenset[str]:
    """Read the names of the arguments of Lightning's trainer from its source; none if it lies elsewhere."""
    for node in _source("lightning", "pytorch/trainer/trainer.py"):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return frozenset(argument.arg for argument in (*node.args.args, *node.args.kwonlyargs))
    return frozenset()


@cache
def _groups() -> dict[str, str]:
    """Read the keys and titles of the callbacks with arguments in the configuration from the source."""
    groups: dict[str, str] = {}
    for node in _source(__name__.partition(".")[0], "callbacks/always_on.py"):
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                groups[ast.literal_eval(key or "None")] = ast.literal_eval(value.elts[1])  # type: ignore[attr-defined] # a tuple
    return groups


def _source(package: str, file: str) -> Iterator[ast.AST]:
    """List the nodes of a source file, without importing it; none if there is no such file."""
    spec = find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder, file)).is_file():
            yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def _configurations(args: list[str]) -> Iterator[Path]:
    """List the configuration files on a command line."""
    for place, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        path = value if equals else "".join(args[place + 1 : place + 2])
        if name in ("--config", "-c") and path and not set("${:\n") & set(path):  # it may be YAML itself
            yield Path(os.path.expanduser(path))


def _keys(path: Path) -> Iterator[str]:
    """List the keys of a configuration file, and those of the trainer in it; none of one that cannot be read."""
    content = None
    with suppress(OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError):  # told when the command line is parsed
        if path.is_file():  # a pipe can be read only once
            content = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    for prefix, part in (("", content), ("trainer.", content.get("trainer") if isinstance(content, dict) else None)):
        if isinstance(part, dict):
            yield from (f"{prefix}{key}".rstrip("+") for key in part)


def _end(command: str, message: str) -> NoReturn:
    print(f"knl {command}: error: {message}", file=sys.stderr)
    raise SystemExit(2)
