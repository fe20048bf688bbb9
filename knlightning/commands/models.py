"""List the networks, and the normalizations that they can be built with.

Both are tables in Markdown, so that the documentation can show them as they are.
"""

from collections.abc import Sequence

from knlightning.commands.command import command
from knlightning.models import list_models
from knlightning.nn.normalization import NORMS


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; `args` are its arguments, None for those of the process."""
    command(models, "knl models", args)


def models() -> None:
    """Print the networks and the normalizations, each as a table in Markdown."""
    print(_table("network", networks()), _table("normalization", normalizations()), sep="\n\n")


def networks() -> dict[str, dict[str, str]]:
    """Describe every network, by its name in `knlightning.models`."""
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


def normalizations() -> dict[str, dict[str, str]]:
    """Describe every normalization, by its name."""
    return {
        spec.name: {
            "private training": "yes" if spec.private else "no",
            "weight and bias": "yes" if spec.affine else "no",
            "normalizes": spec.description,
        }
        for spec in NORMS.values()
    }


def _others(norms: tuple[str, ...], default: str | None) -> str:
    """Name all but the default; what is missing, if that is shorter."""
    missing = [name for name in NORMS if name not in norms]
    if not norms or len(missing) > len(norms):
        return ", ".join(name for name in norms if name != default)
    return f"all but {', '.join(missing)}" if missing else "all"


def _table(title: str, rows: dict[str, dict[str, str]]) -> str:
    header = [title, *next(iter(rows.values()))]
    cells = [header, *([name, *row.values()] for name, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in cells]
    lines.insert(1, f"| {' | '.join('-' * width for width in widths)} |")
    return "\n".join(lines)
