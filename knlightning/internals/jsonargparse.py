"""What is used of jsonargparse that is not documented. Tried with release 4.53."""

from collections.abc import Mapping

from jsonargparse import ArgumentParser


def set_titles(parser: ArgumentParser, titles: Mapping[str, str]) -> None:
    """Set the titles of groups of arguments, which otherwise repeat the docstring of their class.

    `ArgumentParser.groups` is not documented. Tried with jsonargparse 4.53.

    Args:
        parser: The parser.
        titles: Titles by the keys of the groups.
    """
    groups = parser.groups or {}
    for key, title in titles.items():
        groups[key].title = title
