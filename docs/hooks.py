"""What is done to the pages of the site: formulas, links into the reference, and pages of the repository's root."""

import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "README.md")
FORMULA = re.compile(r"^```math\n(.*?)\n```$", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"<code>(knlightning(?:\.\w+)+)</code>")
OPTION = re.compile(r"(?<=[>\s])--\w[\w.+-]*(?=(?:[^<]|<(?!/?code))*</code>)")
TO_ROOT_PAGE = re.compile(rf"\]\(\.\./((?:\.\./)*(?:{'|'.join(map(re.escape, ROOT_PAGES))}))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie in the repository's root."""
    for name in ROOT_PAGES:
        text = (Path(config.config_file_path).parent / name).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn formulas into MathML, which browsers draw by themselves, and mend links to pages in the root."""
    markdown = FORMULA.sub(lambda match: convert(match[1], display="block"), markdown)
    return TO_ROOT_PAGE.sub(r"](\1", markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Link the full names of classes and functions to the reference, where they are in it, and keep options whole."""
    html = OPTION.sub(r'<span class="option">\g<0></span>', html)
    return NAME.sub(r'<autoref identifier="\1" optional><code>\1</code></autoref>', html)


class MadeArguments(griffe.Extension):
    """Shows the arguments that `with_arguments_of` gives to the networks; their source does not have them."""

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Replace parameters and docstring of a function that is decorated so."""
        if not any("with_arguments_of" in str(decorator.value) for decorator in func.decorators):
            return
        made = getattr(import_module(func.module.path), func.name)
        func.parameters = griffe.Parameters(
            *(
                griffe.Parameter(
                    parameter.name,
                    annotation=inspect.formatannotation(parameter.annotation),
                    kind=griffe.ParameterKind.keyword_only,
                    default=repr(parameter.default),
                )
                for parameter in inspect.signature(made).parameters.values()
            )
        )
        func.docstring = griffe.Docstring(inspect.getdoc(made) or "", parent=func)
