"""Objects made again by the configuration that is stored in a checkpoint."""

from argparse import ArgumentError as ParserError
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser


def task_class(config: Mapping[str, Any]) -> type[LightningModule]:
    """Return the class of the task that a configuration names.

    Raises:
        ValueError: If it names none.
    """
    path = (config.get("model") or {}).get("class_path") or ""
    module, _, name = path.rpartition(".")
    found = getattr(import_module(module), name, None) if module else None
    if not (isinstance(found, type) and issubclass(found, LightningModule)):
        raise ValueError(f"the configuration names no task, but {path!r}")
    return found


def make_arguments(task: type[LightningModule], config: Mapping[str, Any]) -> dict[str, Any]:
    """Make the arguments of a task that a configuration describes: the network with new weights, the optimizer, ...

    Raises:
        ValueError: If the configuration is of a task of another class, or does not fit this one.
    """
    stored = task_class(config)
    if not issubclass(stored, task):
        raise ValueError(f"the configuration is that of a {stored.__name__}, which is no {task.__name__}")
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_class_arguments(stored, "model", instantiate=False, fail_untyped=False, sub_configs=True)
    return dict(vars(_made(parser, {"model": config["model"].get("init_args") or {}}).model))


def make_datamodule(config: Mapping[str, Any]) -> LightningDataModule:
    """Make the datamodule that a configuration describes; it reads no data.

    Raises:
        ValueError: If the configuration does not fit.
    """
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data", fail_untyped=False, required=True)
    made: LightningDataModule = _made(parser, {"data": config.get("data")}).data
    return made


def _made(parser: LightningArgumentParser, config: dict[str, Any]) -> Any:
    try:
        return parser.instantiate(parser.parse_object(config))
    except (ParserError, SystemExit) as error:
        raise ValueError(f"the configuration does not fit the installed packages: {error}") from error
