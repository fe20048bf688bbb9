import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from knlightning.run_directory import (
    PRIVACY_REPORT,
    checkpoint_in,
    find_checkpoint,
    holds_checkpoints,
    mark_not_private,
    new_run,
    numbered_runs,
    replacing,
    report_directory,
    run_of,
)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def touch(run, which):
    path = checkpoint_in(run, which)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_runs_are_numbered():
    assert [str(new_run("a")) for _ in range(11)] == [f"runs/a/{n}" for n in range(11)]
    assert str(new_run("b")) == "runs/b/0"
    Path("runs/a/notes").mkdir()
    assert [path.name for path in numbered_runs("a")] == [str(n) for n in reversed(range(11))]


def test_run_of_a_checkpoint():
    run = new_run("a")
    assert not holds_checkpoints(run)
    path = touch(run, "last")
    assert holds_checkpoints(run)
    assert run_of(path) == run
    assert run_of(Path("elsewhere/last.ckpt")) is None


def test_newest_run_that_has_the_checkpoint():
    for _ in range(3):
        new_run("a")
    touch(Path("runs/a/0"), "last")
    expected = touch(Path("runs/a/1"), "last")
    assert find_checkpoint("last", None, "a") == expected
    assert find_checkpoint("last", Path("runs/a/0"), "a") == Path("runs/a/0/checkpoints/last.ckpt")
    assert find_checkpoint(str(expected), None, "b") == expected


@pytest.mark.parametrize(
    ("ckpt_path", "run", "looked"),
    [
        ("best", None, "runs/a/1/checkpoints/best.ckpt, runs/a/0/checkpoints/best.ckpt"),
        ("best", Path("elsewhere"), "elsewhere/checkpoints/best.ckpt"),
        ("no.ckpt", None, "no.ckpt"),
        ("runs", None, "runs"),  # a directory
    ],
)
def test_missing_checkpoint_names_where_it_was_looked_for(ckpt_path, run, looked):
    new_run("a"), new_run("a")
    with pytest.raises(FileNotFoundError, match=looked):
        find_checkpoint(ckpt_path, run, "a")


def test_missing_run_names_where_it_was_looked_for():
    with pytest.raises(FileNotFoundError, match=r"runs/c/\*"):
        find_checkpoint("last", None, "c")


def test_replacing_keeps_the_old_file_until_the_new_one_is_whole():
    path = Path("deep/a.txt")
    with replacing(path) as temporary:
        temporary.write_text("old")
    with contextlib.suppress(KeyError), replacing(path) as temporary:
        temporary.write_text("ne")
        raise KeyError
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize(
    ("checkpoints", "log_dir", "expected"),
    [
        (["root/checkpoints"], "root", "root"),
        (["elsewhere", "root/checkpoints"], "log", "root"),
        (["log/version_3/checkpoints"], "log/version_3", "log/version_3"),
        (["kept"], "log", "kept"),
        ([None], "log/version_3", "log/version_3"),
        ([], None, "root"),
    ],
)
def test_a_report_lies_beside_the_checkpoints(checkpoints, log_dir, expected):
    callbacks = [SimpleNamespace(dirpath=path) for path in checkpoints]
    trainer = SimpleNamespace(default_root_dir="root", checkpoint_callbacks=[*callbacks, object()], log_dir=log_dir)
    assert report_directory(trainer) == Path(expected).absolute()


def test_a_report_is_marked_once():
    mark_not_private(Path("run"), 3)  # there is none
    path = Path("run") / PRIVACY_REPORT
    path.parent.mkdir()
    path.write_text(json.dumps({"epsilon": 1.0, "history": [[1.0, 0.1, 2]]}))
    mark_not_private(Path("run"), 3)
    first = path.read_text()
    assert json.loads(first)["epsilon"] is None
    assert json.loads(first)["history"] == [[1.0, 0.1, 2]]
    assert "from step 3" in json.loads(first)["not_private"]
    mark_not_private(Path("run"), 4)
    assert path.read_text() == first


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_damaged_report_is_removed(text):
    Path(PRIVACY_REPORT).write_text(text)
    mark_not_private(Path(), 3)
    assert not Path(PRIVACY_REPORT).exists()
