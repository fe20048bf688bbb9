"""Texts from outside, such as names of files and classes, made fit for the terminal and for tables."""

from unicodedata import category

FORMULAS = ("=", "+", "-", "@")
"""How a cell begins that a spreadsheet takes for a formula, and so for something to execute."""

ESCAPED = ("Cc", "Cs", "Zl", "Zp")
"""Categories of characters that a terminal obeys, or cannot print."""
DIRECTIONS = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}
"""Characters that turn the direction of the text around."""


def counted(number: int, noun: str) -> str:
    """Write a number of things, with an `s` unless there is one."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def printable(text: str) -> str:
    r"""Write control characters, and bytes that are no UTF-8, as escapes such as `\x1b` and `\udce9`."""
    obeyed = {c for c in text if category(c) in ESCAPED or c in DIRECTIONS}
    return "".join(c.encode("unicode_escape").decode() if c in obeyed else c for c in text)


def cell(text: str) -> str:
    """Make a text fit for a table: `printable`, and with a `'` before it where it would be a formula."""
    text = printable(text)
    return f"'{text}" if text.startswith(FORMULAS) else text
