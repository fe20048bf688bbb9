"""The limits and the order that CONTRIBUTING.md states."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "knlightning"
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef
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


@cache
def nodes(path):
    return list(ast.walk(ast.parse(path.read_text())))


def check(problems, files=FILES):
    """Hold files to a rule: a function tells what is wrong with one, and the error tells it of all."""
    found = [f"{path.relative_to(ROOT)}: {problem}" for path in files for problem in problems(path)]
    assert not found, "\n".join(found)


def folder(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py").replace("__init__", "")


def imports(path):
    """Every module that a file imports, wherever the import stands."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"knlightning.{alias.name}" for alias in node.names if node.module == "knlightning")
            yield "." * node.level + (node.module or "")


def functions(path):
    return [node for node in nodes(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(function):
    """Lines of a function without its docstring."""
    first = function.body[0]
    docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(function, clean=False) else 0
    return function.end_lineno - function.lineno + 1 - docstring


def test_files_and_functions_are_short():
    def long(path):
        if (lines := len(path.read_text().splitlines())) > MOST_LINES:
            yield f"{lines} lines"
        yield from (f.name for f in functions(path) if length(f) > MOST_FUNCTION_LINES)

    check(long)


def test_imports_go_one_way():
    def wrong(path):
        own = folder(path)
        allowed = LEAVES | MAY_IMPORT.get(own, set()) | {own}
        for module in imports(path):
            top, _, rest = module.partition(".")
            part = rest.partition(".")[0]
            if top == "knlightning" and part not in allowed and not part.startswith("__"):
                yield f"may not import {module}"
            if not top:
                yield f"relative import of {module}"
            if own in PURE_TORCH and top in ("lightning", "torchmetrics", "opacus", "jsonargparse"):
                yield f"is pure torch, and imports {module}"

    check(wrong)


def test_every_file_has_its_test():
    files = [path.relative_to(PACKAGE) for path in FILES if path.name != "__init__.py"]
    mirrored = [ROOT / "tests" / path.with_name(f"test_{path.name.lstrip('_')}") for path in files]
    assert not [path for path in mirrored if not path.is_file()]


def test_tests_are_untyped():
    def typed(path):
        tests = [function for function in functions(path) if function.name.startswith("test_")]
        return [test.name for test in tests if test.returns or any(a.annotation for a in test.args.args)]

    check(typed, TESTS)


def test_docstrings_have_one_dialect():
    def wrong(path):
        for text in [ast.get_docstring(node) or "" for node in nodes(path) if isinstance(node, DOCUMENTED)]:
            for section, begins in (("Args", r"[^a-z]|u?int|float|bool"), ("Raises", "If ")):
                entries = re.search(rf"^{section}:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
                for entry in re.finditer(r"^    \S[^:\n]*: (.*)", entries[1] if entries else "", re.MULTILINE):
                    if not re.match(begins, entry[1]):
                        yield entry[0]

    check(wrong)


def test_layers_and_networks_document_what_they_are_called_with():
    def wrong(path):
        classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
        bases = {ast.unparse(base) for cls in classes for base in cls.bases if not cls.name.startswith("_")}
        for cls in classes:
            if cls.name in bases or "Args:" in (ast.get_docstring(cls) or ""):
                for forward in [node for node in cls.body if getattr(node, "name", "") == "forward"]:
                    named = re.findall(r"^    (\w+): ", ast.get_docstring(forward) or "", re.MULTILINE)
                    if named != [argument.arg for argument in forward.args.args[1:]]:
                        yield cls.name

    check(wrong, [path for path in FILES if folder(path) in ("nn", "models")])


def test_messages_of_the_library_name_arguments_only():
    """A command adds `--` or the path in the configuration: who calls a function from Python has neither."""

    def wrong(path):
        for node in nodes(path):
            checks = isinstance(node, ast.Call) and getattr(node.func, "id", "").startswith(("check", "ArgumentError"))
            for part in ast.walk(node) if checks or isinstance(node, ast.Raise) else ():
                text = part.value if isinstance(part, ast.Constant) else None
                if isinstance(text, str) and re.search(r"init_args|(^|\s)--[a-z]", text):
                    yield f"line {part.lineno}: {text}"

    check(wrong, [path for path in FILES if folder(path) != "commands"])
