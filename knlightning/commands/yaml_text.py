"""YAML as all commands read it: keys that stand twice, and aliases without end, are refused."""

import os
from typing import Any, NoReturn

import yaml
from jsonargparse import get_loader, set_loader
from jsonargparse.typing import register_type

from knlightning.commands.hints import explained
from knlightning.commands.names import complete_class_paths
from knlightning.internals.jsonargparse import in_one_line

MOST_ALIASED = 1000
"""Largest number of values that aliases (*name) may add to those that are written."""
DEEPEST = 100
"""Largest depth of nested values."""
_load = get_loader("yaml")


def read_yaml_strictly() -> None:
    """Let all parsers of jsonargparse in this process read YAML by `load_yaml`, and refuse paths that are no text."""
    set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))
    register_type(os.PathLike, os.fspath, _path, fail_already_registered=False)


def load_yaml(text: str, path: str = "") -> Any:
    """Read YAML as jsonargparse does.

    Args:
        text: The text.
        path: The file that holds it, seen from the working directory; empty for none.

    Raises:
        yaml.YAMLError: If the text is not YAML; if a key stands twice in the same place; if aliases add more than
            `MOST_ALIASED` values; if values are nested deeper than `DEEPEST`. The message names the file.
    """
    try:
        node = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        written: dict[int, int] = {}
        if node is not None and _count(node, "", 0, written) - len(written) > MOST_ALIASED:
            raise yaml.YAMLError(f"aliases (*name) stand for more than {MOST_ALIASED} values: write them out")
        if path and not isinstance(node, yaml.MappingNode):
            raise yaml.YAMLError("a configuration has keys with values (key: value), and this has none")
        return complete_class_paths(_load(text))
    except yaml.YAMLError as error:
        raise yaml.YAMLError(f"{os.path.abspath(path)}: {error}" if path else str(error)) from error


def _path(value: Any) -> Any:
    """Return a path as it is; jsonargparse itself would make the name `True` of true."""
    if not isinstance(value, str | os.PathLike):
        raise ValueError("Expected a path. A name that is a number or a word of YAML needs quotes")
    return value


class NamesFiles:
    """Let an `ArgumentParser` name a configuration file that is not text, and put what is wrong with a value in a line.

    A base class before the parser's own.
    """

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong in a line, and exit."""
        if self.exit_on_error:  # type: ignore[attr-defined] # otherwise it is the parser of a part
            said = explained(in_one_line(message), self)  # type: ignore[arg-type] # it is a base class of one
            self.exit(2, f"{self.prog}: error: {said}\n")  # type: ignore[attr-defined] # of the parser
        super().error(message, ex)  # type: ignore[misc] # of the parser
        raise AssertionError("a parser leaves at an error")

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Read a configuration file.

        Raises:
            ValueError: If it is not text.
        """
        try:
            return super().parse_path(path, *args, **kwargs)  # type: ignore[misc] # of the parser
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not text in UTF-8: {error}") from error


def _count(node: yaml.Node, key: str, depth: int, counted: dict[int, int]) -> int:
    """Count the values in a node, with what aliases stand for, and look for keys that stand twice.

    Args:
        node: The node; that of an alias is the node it stands for.
        key: Where it stands.
        depth: How deep.
        counted: Results by the identities of the nodes.
    """
    if id(node) in counted:
        return counted[id(node)]
    if depth > DEEPEST:
        raise yaml.YAMLError(f"values are nested deeper than {DEEPEST}, or an alias (*name) stands within itself")
    children: list[tuple[str, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise yaml.YAMLError(f"a key in line {name.start_mark.line + 1} is not a word")
            here, line = f"{key}.{name.value}".lstrip("."), name.start_mark.line + 1
            if name.value in lines:
                raise yaml.YAMLError(
                    f"the key {here} stands twice, in line {lines[name.value]} and in line {line}: the latter would"
                    " replace all of the former. Keep one of them"
                )
            lines[name.value] = line
            children.append((here, value))
    elif isinstance(node, yaml.SequenceNode):
        children = [(f"{key}[{place}]", value) for place, value in enumerate(node.value)]
    counted[id(node)] = 1 + sum(_count(value, here, depth + 1, counted) for here, value in children)
    return counted[id(node)]
