import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from knlightning.run_directory import (
    PRIVACY_REPORT,
    checkpoint_in,
    find_checkpoint,
    holds_checkpoints,
    locked,
    make_folder,
    mark_not_private,
    new_run,
    numbered_runs,
    replacing,
    replacing_folder,
    report_directory,
    run_of,
    run_of_config,
    sweep,
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
    assert os.listdir("deep") == ["a.txt"]


def test_writers_of_the_same_file_do_not_meet():
    with replacing(Path("a")) as one, replacing(Path("a")) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert Path("a").read_text() == "one"


def test_replacing_follows_no_link():
    Path("secret").write_text("old")
    Path("a").symlink_to("secret")
    with replacing(Path("a")) as temporary:
        temporary.write_text("new")
    assert (Path("a").read_text(), Path("secret").read_text()) == ("new", "old")


def test_new_files_have_the_usual_rights():
    Path("usual").touch()
    with replacing(Path("a")) as temporary:
        temporary.touch()
    assert Path("a").stat().st_mode == Path("usual").stat().st_mode


def test_what_cannot_be_written_is_named_with_the_cause():
    Path("folder/inner").mkdir(parents=True)
    with (
        pytest.raises(IsADirectoryError, match="cannot be written: Is a directory: 'folder'"),
        replacing(Path("folder")),
    ):
        pass
    with pytest.raises(OSError, match="No space left on device: 'a'"), replacing(Path("a")):
        raise OSError(28, "No space left on device")
    with pytest.raises(FileNotFoundError, match="other"), replacing(Path("a")):
        Path("other").read_text()  # has nothing to do with the file that is written
    assert os.listdir() == ["folder"]


def test_temporary_files_are_swept_unless_a_process_is_writing_them():
    checkpoints = Path("run/checkpoints")
    checkpoints.mkdir(parents=True)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living = f".{os.getppid()}-0a.tmp"
    for name in (
        f".{dead.pid}-0a.tmp",
        f".{os.getpid()}-0a.tmp",
        living,
        ".last.ckpt.tmp",
        "last.ckpt",
        f".{9**99}-1.tmp",
    ):
        (checkpoints / name).touch()
    Path("run/.config.yaml.tmp").touch()
    sweep(Path("run"))
    assert sorted(os.listdir(checkpoints)) == sorted([living, "last.ckpt"])
    assert os.listdir("run") == ["checkpoints"]


def test_a_run_has_one_holder():
    Path("run").mkdir()
    message = f"run is in use by process {os.getpid()} on "
    with locked(Path("run")), pytest.raises(BlockingIOError, match=message), locked(Path("run")):
        pass
    with locked(Path("run")):
        pass
    assert not os.listdir("run")


def test_a_dead_process_holds_nothing_even_if_its_children_live():
    Path("run").mkdir()
    code = (
        "import os, sys, time; from pathlib import Path; from knlightning.run_directory import locked\n"
        "with locked(Path('run')):\n"
        "    if not os.fork(): print(os.getpid(), flush=True)\n"
        "    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        with pytest.raises(BlockingIOError, match=f"process {process.pid} on"), locked(Path("run")):
            pass
        process.kill()
        process.wait()
        process.stdout.close()
        with locked(Path("run")):  # though the file lies there, and the child runs
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_planted_link_is_no_lock():
    Path("run").mkdir()
    Path("secret").write_text("old")
    Path("run/.lock").symlink_to("../secret")
    with pytest.raises(OSError, match=r"\.lock"), locked(Path("run")):
        pass
    assert Path("secret").read_text() == "old"


@pytest.mark.parametrize(("link", "name"), [("runs", "a"), ("runs/a", "a")])
def test_links_to_nowhere_end_no_search(link, name):
    Path(link).parent.mkdir(exist_ok=True)
    Path(link).symlink_to("nowhere")
    with pytest.raises(NotADirectoryError, match=f"{link} is a link to nowhere"):
        new_run(name)


def test_files_are_no_folders():
    Path("runs").touch()
    with pytest.raises(NotADirectoryError, match="runs is no folder"):
        make_folder(Path("runs"))


def test_links_to_nowhere_have_a_number_too():
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/4").symlink_to("nowhere")
    assert new_run("a") == Path("runs/a/5")


def test_a_folder_that_cannot_be_read_is_named(monkeypatch):
    new_run("a")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)  # rights do not bind the administrator, who may run the tests
    with pytest.raises(PermissionError, match="runs/a"):
        new_run("a")


def test_the_run_of_a_configuration():
    Path("run/checkpoints").mkdir(parents=True)
    assert run_of_config(Path("run/config.yaml")) == Path("run")
    assert run_of_config(Path("run/other.yaml")) is None
    assert run_of_config(Path("config.yaml")) is None


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


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = Path("a/b")
    with replacing_folder(path) as folder:
        (folder / "old").touch()
        assert not path.exists()
    with contextlib.suppress(ValueError), replacing_folder(path) as folder:
        (folder / "new").touch()
        raise ValueError
    assert os.listdir(path) == ["old"]
    with replacing_folder(path) as folder:
        (folder / "new").touch()
    assert os.listdir(path) == ["new"]
    assert os.listdir("a") == ["b"]


def test_folders_that_a_killed_process_has_left_are_swept():
    left = Path("run/.999999999-0123.tmp")
    left.mkdir(parents=True)
    (left / "file").touch()
    sweep(Path("run"))
    assert os.listdir("run") == []
