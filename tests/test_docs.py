import json
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from pathlib import Path

import jsonargparse
import numpy as np
import pytest
import yaml
from standins import write_image_folder

import knlightning
from knlightning.commands.main import list_commands, main, run

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
RESULTS = ROOT / "docs" / "reproduce.md"
# the examples of CONTRIBUTING.md are of files that it adds; the page of results is written by a command
PARSED = [page for page in PAGES if page not in (CONTRIBUTING, RESULTS)]


def name_of(path):
    return str(path.relative_to(ROOT))


def blocks(page, language):
    """Return (title, code) of the fenced blocks in a language."""
    return [(title, code) for lang, title, code in FENCE.findall(page.read_text()) if lang == language]


def command_lines(page):
    """Return the shell commands on a page: those of bash blocks, and those of inline code that begin with `knl`."""
    lines = [line for _, code in blocks(page, "bash") for line in code.replace("\\\n", " ").splitlines()]
    commands = [command.strip() for line in lines for command in line.split("&&")]
    inline = re.findall(r"`(knl [^`]+)`", FENCE.sub("", page.read_text()))
    return list(dict.fromkeys([*commands, *inline]))


def every_command(pages, pattern):
    found = {}
    for page in pages:
        for command in command_lines(page):
            if match := re.search(pattern, command):
                found.setdefault(match[0], name_of(page))
    return [pytest.param(command, id=f"{page}: {command}") for command, page in found.items()]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_pictures_are_there(page):
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    missing = [t for t in targets if t and not t.startswith("http") and not (page.parent / t).exists()]
    assert not missing


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_navigation_lists_every_page():
    def leaves(value):
        if isinstance(value, str):
            return [value]
        return [leaf for inner in (value.values() if isinstance(value, dict) else value) for leaf in leaves(inner)]

    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    listed = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted([*pages, "CONTRIBUTING.md", "CHANGELOG.md", "README.md"])


def test_reference_has_every_package_and_command():
    packages = {path.parent.name for path in Path(knlightning.__path__[0]).glob("*/__init__.py")} - {"internals"}
    assert {page.stem for page in (ROOT / "docs" / "api").glob("*.md")} == packages
    text = (ROOT / "docs" / "api" / "commands.md").read_text()
    assert re.findall(r"^\| `knl ([\w-]+)` \|", text, re.MULTILINE) == list(list_commands())


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=name_of)
def test_yaml_is_valid(page):
    for _, code in blocks(page, "yaml"):
        assert yaml.safe_load(code)


PYTHON_PAGES = [page for page in PAGES if page != CONTRIBUTING and blocks(page, "python")]


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=name_of)
def test_python_runs(page):
    names = {}  # the blocks of a page follow one another
    for title, code in blocks(page, "python"):
        if not title:
            exec(compile(code, name_of(page), "exec"), names)


def test_docstrings_are_markdown():
    sources = sorted(Path(knlightning.__path__[0]).rglob("*.py"))
    roles = [f"{path}: {role}" for path in sources for role in re.findall(r":\w+:`[^`]+`", path.read_text())]
    assert not roles  # of Sphinx; here names stand in backticks alone


def test_ci_runs_the_tests_as_the_readme_says():
    (develop,) = [line for line in command_lines(ROOT / "README.md") if line.startswith("pytest")]
    (install,) = [line for line in command_lines(ROOT / "README.md") if "[dev]" in line]
    script = (ROOT / ".ci" / "run").read_text().replace("--quiet ", "").splitlines()
    assert develop in script
    assert install in script


def test_containers_install_and_run_as_the_readme_says():
    instructions = re.findall(r"^(RUN|CMD) (.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert [name for name, _ in instructions] == ["RUN", "CMD"]
    readme = command_lines(ROOT / "README.md")
    assert instructions[0][1] in readme
    assert shlex.join(json.loads(instructions[1][1])) in readme
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert (ROOT / ".devcontainer" / container["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert container["postCreateCommand"] == instructions[0][1]


def test_extras_are_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page in PAGES:
        for names in re.findall(r"pip install -e '\.\[([\w,]+)\]'", page.read_text()):
            assert set(names.split(",")) <= extras.keys(), page


class Parsed(BaseException):
    """The arguments are good."""


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """A folder with the repository's configurations and the files that pages show; commands are parsed, and not run."""
    for folder in ("configs", "experiments"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for page in PAGES:
        for language in ("python", "yaml"):
            for title, code in blocks(page, language):
                if title and "/" not in title:
                    (tmp_path / title).write_text(code)
    parse = jsonargparse.ArgumentParser.parse_args

    def parse_alone(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(jsonargparse.ArgumentParser, "parse_args", parse_alone)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def parses(function, *args):
    try:
        function(*args)
    except Parsed:
        return True
    except SystemExit as end:  # a help
        return end.code == 0
    return False


@pytest.mark.parametrize("command", every_command(PARSED, r"\bknl [a-z].*"))
def test_command_parses(command, examples):
    command = re.sub(r"runs/(quickstart|photos_knresnet8)/0/config\.yaml", r"configs/\1.yaml", command)
    name, *args = shlex.split(command, comments=True)[1:]
    assert name in list_commands()
    if args:
        assert parses(run, [name, *args])


@pytest.mark.parametrize("command", every_command(PARSED, r"^python experiments/.*"))
def test_script_parses(command, examples, monkeypatch):
    monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
    assert parses(runpy.run_path, sys.argv[0], None, "__main__")


# commands on pages for users, run on a few batches in a folder with one run of the quickstart

GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
RUNS = (  # what takes longer has tests of its own; the weights of finetune.yaml are downloaded
    r"knl (fit|validate|test|predict) --config (configs/(quickstart|digits_dp|scenes_fcn_knresnet)|runs/\S+)"
    r"(?!.*(devices|Wandb|MLFlow|PHOTOS|finetune.yaml)).*|knl curves .*"
)
FEW = [
    "--trainer.accelerator=cpu",
    *(f"--trainer.limit_{part}_batches=1" for part in ("train", "val", "test", "predict")),
]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    write_image_folder(folder / "FOLDER")
    for part in ("train", "test"):  # of the datamodule on the page about data
        pixels = np.random.default_rng(0).integers(0, 256, (8, 3, 32, 32), np.uint8)
        np.savez(folder / f"pets_{part}.npz", images=pixels, labels=np.arange(8) % 2)
    for page in GUIDES:
        for title, code in [block for language in ("python", "yaml") for block in blocks(page, language)]:
            if title and "/" not in title:
                (folder / title).write_text(code)
    few = [*FEW, "--trainer.max_epochs=1", f"--run_dir={folder}/runs/quickstart/0"]
    main(["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), *few])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", every_command(GUIDES, RUNS))
def test_command_runs(command, quickstart, tmp_path, monkeypatch):
    shutil.copytree(quickstart, tmp_path, dirs_exist_ok=True)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    name, *args = shlex.split(command, comments=True)[1:]
    if name in ("fit", "validate", "test", "predict"):
        args += FEW
    if name == "fit":  # finders need more batches and no limit of epochs
        args += ["--trainer.limit_train_batches=120"] if "LearningRateFinder" in command else []
        args += ["--trainer.max_epochs=2" if "last" in args else "--trainer.max_epochs=1"]
    main([name, *args])
