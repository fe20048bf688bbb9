"""Grids of settings: each cell of a table is a configuration, of which the row and the column say what is special."""

from collections.abc import Mapping, Sequence

from knlightning.analysis.search import Search
from knlightning.analysis.settings import LEARNING_RATE, Value, short
from knlightning.checks import ArgumentError, check, check_choice

Cell = tuple[str, str]
"""Labels of a row and of a column."""
Settings = Mapping[str, Value | list[Value]]


def list_cells(
    rows: Mapping[str, Settings], columns: Mapping[str, Settings], settings: Settings, only: Sequence[str] = ()
) -> dict[Cell, dict[str, Value]]:
    """List the cells of a table with their settings.

    Args:
        rows: Settings of each row by its label; they take precedence over those of a column.
        columns: Settings of each column by its label; they take precedence over `settings`.
        settings: Settings of all cells. Here and in rows a list has one value for each column.
        only: Labels of rows and columns to which the table is limited; empty for all.

    Returns:
        The settings of each cell, by dotted names without `.init_args`, row after row.

    Raises:
        ArgumentError: If a list has another length than there are columns, a label is not known, or a cell has no
            configuration file or no learning rate.
    """
    for label in only:
        check_choice("only", label, [*rows, *columns])
    cells = {}
    for row, of_row in rows.items():
        for place, (column, of_column) in enumerate(columns.items()):
            merged: dict[str, Value] = {}
            for name, part in (("settings", settings), (f"columns.{column}", of_column), (f"rows.{row}", of_row)):
                for key, value in part.items():
                    if isinstance(value, list):
                        check(
                            len(value) == len(columns),
                            f"{name}.{key}",
                            value,
                            f"a list of {len(columns)} values, one for each column",
                        )
                        value = value[place]
                    merged[short(key)] = value
            for key in ("config", short(LEARNING_RATE)):
                if key not in merged:
                    raise ArgumentError("settings", settings, f"with {key}", f"Nothing sets it for {row}, {column}")
            if _chosen(row, rows, only) and _chosen(column, columns, only):
                cells[row, column] = merged
    return cells


def format_table(searches: Mapping[Cell, Search], learning_rates: bool) -> str:
    """Write what was found as a table in Markdown.

    Args:
        searches: What was found for each cell; one that is not there stays empty.
        learning_rates: Whether a second column tells the best learning rates.
    """
    columns = list(dict.fromkeys(column for _, column in searches))
    second = " learning rate |" if learning_rates else ""
    lines = [
        "| |" + "".join(f" {column} |{second}" for column in columns),
        "| --- |" + (" --- |" * (1 + learning_rates)) * len(columns),
    ]
    for row in dict.fromkeys(row for row, _ in searches):
        line = f"| {row} |"
        for column in columns:
            found = searches.get((row, column))
            line += f" {found.accuracy} |" if found else " |"
            if learning_rates:
                line += f" {found.learning_rate:g} |" if found else " |"
        lines.append(line)
    return "\n".join(lines) + "\n"


def _chosen(label: str, labels: Mapping[str, Settings], only: Sequence[str]) -> bool:
    return label in only or not any(other in only for other in labels)
