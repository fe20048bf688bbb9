from pathlib import Path

import pytest

from knlightning.commands.claim import Claim


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("run", [None, Path("a/b/c")])
def test_what_was_made_is_discarded_with_its_parents(run, tmp_path):
    claim = Claim()
    made = claim.make(run, "name")
    assert made.is_dir()
    (made / "file").touch()
    claim.discard(with_content=False)
    assert (made / "file").is_file()
    claim = Claim()
    other = claim.make(None, "name")
    (other / "file").touch()
    claim.discard(with_content=True)
    assert not other.exists()
    assert (made / "file").is_file()


def test_nothing_is_left_of_a_run_that_was_discarded(tmp_path):
    claim = Claim()
    claim.make(None, "name")
    claim.discard(with_content=True)
    assert not list(tmp_path.iterdir())


def test_what_was_there_stays():
    Path("run").mkdir()
    claim = Claim()
    assert claim.make(Path("run"), "name") == Path("run")
    claim.discard(with_content=True)
    assert Path("run").is_dir()


def test_a_claim_is_held_until_it_is_given_up():
    Path("run").mkdir()
    first, second = Claim(), Claim()
    first.lock(Path("run"))
    with pytest.raises(BlockingIOError, match="in use by process"):
        second.lock(Path("run"))
    first.release()
    second.lock(Path("run"))
    second.release()
    assert not list(Path("run").iterdir())


def test_temporary_files_of_killed_processes_are_swept():
    Path("run/checkpoints").mkdir(parents=True)
    (Path("run") / "checkpoints" / ".last.ckpt.tmp").touch()
    claim = Claim()
    claim.lock(Path("run"))
    claim.release()
    assert not list(Path("run/checkpoints").iterdir())
