"""The limits and the order that CONTRIBUTING.md states."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "knlightning"
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MOST_LINES, MOST_FUNCTION_LINES = 350, 60

LEAVES = {"checkpoint_files", "checks", "pages", "protocols", "run_directory", "text", "internals", ""}
MAY_IMPORT = {
    "nn": set(),
    "models": {"nn"},
    "data": {"nn"},
    "tasks": {"nn", "models"},
    "callbacks": {"tasks"},
    "privacy": {"nn", "models", "data", "tasks"},
    "export": set(),
    "loading": {"data", "tasks", "export"},
    "": {"loading"},
    "timm": {"models"},
    "cli": {"commands"},
    "analysis": {"nn", "models", "data", "tasks", "callbacks", "privacy"},
    "commands": {"nn", "models", "data", "tasks", "callbacks", "privacy", "analysis", "export", "loading"},
}
"""What each folder may import, besides itself and the leaves, which import nothing but each other."""
PURE_TORCH = {"nn", "models", "checks", "text"}


def name(path):
    return str(path.relative_to(ROOT))


def folder(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py").replace("__init__", "")


def imports(path):
    """Every module that a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative import"
            if node.module == "knlightning":
                yield from (f"knlightning.{alias.name}" for alias in node.names)
            yield node.module


def functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def length(function):
    """Lines of a function without its docstring."""
    first = function.body[0]
    has_docstring = isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)
    docstring = first.end_lineno - first.lineno + 1 if has_docstring else 0
    return function.end_lineno - function.lineno + 1 - docstring


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_and_functions_are_short(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES
    long = {function.name: length(function) for function in functions(path) if length(function) > MOST_FUNCTION_LINES}
    assert not long


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_go_one_way(path):
    own = folder(path)
    allowed = LEAVES | MAY_IMPORT.get(own, set()) | {own}
    for module in imports(path):
        top, _, rest = module.partition(".")
        if top == "knlightning":
            part = rest.partition(".")[0]
            assert part in allowed or part.startswith("__"), f"{own or 'the package'} may not import {module}"
        if own in PURE_TORCH:
            assert top not in ("lightning", "torchmetrics", "opacus", "jsonargparse"), f"{own} is pure torch"


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "__init__.py"], ids=name)
def test_every_file_has_its_test(path):
    relative = path.relative_to(PACKAGE)
    mirrored = ROOT / "tests" / relative.with_name(f"test_{relative.name.lstrip('_')}")
    assert mirrored.is_file()


@pytest.mark.parametrize("path", TESTS, ids=name)
def test_tests_are_untyped(path):
    tests = [function for function in functions(path) if function.name.startswith("test_")]
    assert not [test.name for test in tests if test.returns or any(a.annotation for a in test.args.args)]


def docstrings(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            yield node, ast.get_docstring(node)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_docstrings_have_one_dialect(path):
    for _, text in docstrings(ast.parse(path.read_text())):
        for section in ("Args", "Raises"):
            found = re.search(rf"^{section}:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
            entries = re.findall(r"^    (\S[^:\n]*): (.*)", found.group(1), re.MULTILINE) if found else []
            for entry, words in entries:
                if section == "Raises":
                    assert words.startswith("If "), f"{entry}: {words}"
                else:
                    assert not words[0].islower() or re.match(r"u?int|float|bool", words), f"{entry}: {words}"


@pytest.mark.parametrize("path", [path for path in FILES if folder(path) in ("nn", "models")], ids=name)
def test_layers_and_networks_document_what_they_are_called_with(path):
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    bases = {ast.unparse(base) for cls in classes for base in cls.bases if not cls.name.startswith("_")}
    for cls in classes:
        if cls.name in bases or "Args:" in (ast.get_docstring(cls) or ""):
            for forward in [node for node in cls.body if getattr(node, "name", "") == "forward"]:
                named = re.findall(r"^    (\w+): ", ast.get_docstring(forward) or "", re.MULTILINE)
                assert named == [argument.arg for argument in forward.args.args[1:]], cls.name


def messages(tree):
    """The texts of errors: in `raise` statements, and in calls of the functions that check arguments."""
    for node in ast.walk(tree):
        checks = isinstance(node, ast.Call) and getattr(node.func, "id", "").startswith(("check", "ArgumentError"))
        if checks or isinstance(node, ast.Raise):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.lineno, part.value


@pytest.mark.parametrize("path", [path for path in FILES if folder(path) != "commands"], ids=name)
def test_messages_of_the_library_name_arguments_only(path):
    """A command adds `--` or the path in the configuration: who calls a function from Python has neither."""
    for line, text in messages(ast.parse(path.read_text())):
        assert not re.search(r"init_args|(^|\s)--[a-z]", text), f"line {line}: {text}"
