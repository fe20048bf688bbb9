"""List models, norms, data, tasks, callbacks, configs.

Each is a table in Markdown, so that the documentation can show it as it is.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Literal

from knlightning.commands.command import command
from knlightning.commands.names import short_names

Rows = dict[str, dict[str, str]]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; `args` are its arguments, None for those of the process."""
    if args and not args[0].startswith("-"):
        args = [f"--kind={args[0]}", *args[1:]]
    command(list_kind, "knl list", args)


def list_kind(kind: Literal["models", "norms", "data", "tasks", "callbacks", "configs"] | None = None) -> None:
    """Print what there is, each kind as a table in Markdown: knl list models, for example.

    Args:
        kind: What to list; null for all. Configurations are those in the folder `configs` of the working directory.
    """
    tables = {name: rows() for name, rows in KINDS.items() if kind in (None, name)}
    print(*(_table(name, rows) for name, rows in tables.items() if rows), sep="\n\n")


def networks() -> Rows:
    """Describe every network, by its name in `knlightning.models`."""
    from knlightning.models import list_models  # each function imports what it describes, as that takes seconds

    return {
        model.name: {
            "parameters": f"{model.num_parameters:,}",
            "norm": model.norm or "",
            "other norms": _others(model.norms, model.norm),
            "images": model.images,
            "task": model.task,
            "published weights": model.weights,
            "tables of the paper": ", ".join(model.tables),
        }
        for model in list_models()
    }


def normalizations() -> Rows:
    """Describe every normalization, by its name."""
    from knlightning.nn.normalization import NORMS

    return {
        spec.name: {
            "private training": "yes" if spec.private else "no",
            "weight and bias": "yes" if spec.affine else "no",
            "normalizes": spec.description,
        }
        for spec in NORMS.values()
    }


def classes(base: str) -> Rows:
    """Describe the classes that a configuration can name, by the first line of the text of each.

    Args:
        base: Path of what they are; those that are bases of others, as their text says, are left out.
    """
    kind: type = resolve_name(base)
    found = {name: getattr(import_module(path.rpartition(".")[0]), name) for name, path in short_names().items()}
    texts = {
        name: (inspect.getdoc(cls) or "").partition("\n\n")[0].replace("\n", " ")
        for name, cls in found.items()
        if isinstance(cls, type) and issubclass(cls, kind)
    }
    return {name: {"what it is": text} for name, text in texts.items() if not text.startswith("Base of")}


def callbacks() -> Rows:
    """Describe the callbacks, and how a run gets them."""
    from knlightning.callbacks import CONFIGURED, made_for_every_run

    always = {type(callback).__name__ for callback in made_for_every_run("", {"trainer": {}}, has_logger=False)}
    keys = {cls.__name__: f"the key {key}" for key, (cls, _) in CONFIGURED.items()}
    return {
        name: {"given by": "every run has it" if name in always else keys.get(name, "--trainer.callbacks+"), **row}
        for name, row in classes("lightning.pytorch.Callback").items()
    }


def configs() -> Rows:
    """Describe the configurations in the folder `configs`, by the first sentence of each."""
    rows: Rows = {}
    for path in sorted(Path("configs").glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").split("\n#\n")[0].splitlines()
        text = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
        rows[str(path)] = {"what it does": re.split(r"[.:](?: |$)", text)[0]}
    return rows


def _others(norms: tuple[str, ...], default: str | None) -> str:
    """Name all but the default; what is missing, if that is shorter."""
    from knlightning.nn.normalization import NORMS

    missing = [name for name in NORMS if name not in norms]
    if not norms or len(missing) > len(norms):
        return ", ".join(name for name in norms if name != default)
    return f"all but {', '.join(missing)}" if missing else "all"


def _table(title: str, rows: Rows) -> str:
    header = [title, *next(iter(rows.values()))]
    cells = [header, *([name, *row.values()] for name, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in cells]
    lines.insert(1, f"| {' | '.join('-' * width for width in widths)} |")
    return "\n".join(lines)


KINDS: dict[str, Callable[[], Rows]] = {
    "models": networks,
    "norms": normalizations,
    "data": partial(classes, "lightning.pytorch.LightningDataModule"),
    "tasks": partial(classes, "knlightning.tasks.Task"),
    "callbacks": callbacks,
    "configs": configs,
}
