"""The examples of CONTRIBUTING.md, each added to a copy of the project from outside, and run."""

import re
import shutil
import subprocess
import sys
from collections import defaultdict

import pytest
from standins import PROJECT

TEXT = (PROJECT / "CONTRIBUTING.md").read_text()
SECTIONS = dict(re.findall(r"^### ([^\n]+)\n(.*?)(?=^##)", TEXT, re.M | re.S))
BLOCK = re.compile(r'^```(\w+) title="([^"]+)"\n(.*?)^```$', re.M | re.S)
FILES = {  # new ones, and those of the package that are changed
    "A normalization": ({"knlightning/nn/rms.py"}, {"knlightning/nn/normalization.py"}),
    "A dataset": ({"knlightning/data/stripes.py", "configs/stripes_knresnet8.yaml"}, set()),
    "A network": ({"knlightning/models/tiny.py", "configs/digits_tiny_net.yaml"}, set()),
    "A callback of every run": ({"knlightning/callbacks/gradient_norm.py"}, {"knlightning/callbacks/always_on.py"}),
    "A command": ({"knlightning/commands/params.py"}, set()),
}
RUN = "import shlex, sys; from knlightning.commands.main import main\nfor line in sys.argv[1:]: main(shlex.split(line))"


def apply(section, root):
    """Write the files of a section, and add the lines of its differences; return both by their paths."""
    paths = defaultdict(set)
    for language, title, code in BLOCK.findall(section):
        path = root / title
        if language == "diff":
            first, *added = code.splitlines()
            assert first[0] == " "
            assert all(line[0] == "+" for line in added)
            anchor = first[1:] + "\n"
            assert path.read_text().count(anchor) == 1, f"{title} has no such line: {anchor}"
            path.write_text(path.read_text().replace(anchor, anchor + "".join(line[1:] + "\n" for line in added)))
            paths["changed"].add(title)
        else:
            assert not path.exists()
            path.write_text(code)
            paths["new"].add(title)
    return paths["new"], paths["changed"]


@pytest.fixture
def copy(tmp_path):
    for folder in ("knlightning", "configs"):
        shutil.copytree(PROJECT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_every_kind_takes_the_files_that_the_table_says(copy):
    assert {name: apply(text, copy) for name, text in SECTIONS.items() if BLOCK.search(text)} == FILES


@pytest.mark.slow
def test_every_example_works(copy):
    for text in SECTIONS.values():
        apply(text, copy)
    lines = [line for text in SECTIONS.values() for line in re.findall(r"^knl (.*)$", text, re.M)]
    assert len(lines) == len(FILES)
    lines = [f"{line} --trainer.limit_train_batches 12" if line.startswith("fit") else line for line in lines]
    done = subprocess.run([sys.executable, "-c", RUN, *lines, "list"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = (copy / "runs" / "quickstart" / "0" / "metrics.csv").read_text()
    assert "train/gradient_norm" in metrics.splitlines()[0]
    assert "tiny_net" in done.stdout
    assert re.search(r"^\| rms +\|", done.stdout, re.M)
    assert re.search(r"^\d{5,}$", done.stdout, re.M)  # parameters, counted by the new command
