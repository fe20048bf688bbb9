import json
import os

import pytest
from commands.runs import accuracy, column

from knlightning.commands.main import main


@pytest.mark.parametrize("which", ["last", "best", "runs/tiny/0/checkpoints/best.ckpt"])
def test_evaluation_gives_the_accuracy_that_fit_reported_and_leaves_the_run_as_it_is(folder, capsys, which):
    """Digits have no validation images of their own: with val_split 0 those are the test images."""
    before = {path: path.read_bytes() for path in (folder / "runs").rglob("*") if path.is_file()}
    main(["test", "--config", "tiny.yaml", "--ckpt_path", which])
    scores = [value for _, value in column(folder / "runs" / "tiny" / "0", "val/acc")]
    assert accuracy(capsys) == pytest.approx(scores[-1] if which == "last" else max(scores), abs=5e-5)
    results = folder / "runs" / "tiny" / "0" / "test"
    if "/" in which:  # another run than that of the configuration, which is left alone
        assert not results.exists()
        return
    report = json.loads((results / "test.json").read_text())
    assert report["checkpoint"]["path"].endswith(f"runs/tiny/0/checkpoints/{which}.ckpt")
    assert report["checkpoint"]["epoch"] < 3
    files = {path: path.read_bytes() for path in (folder / "runs").rglob("*") if path.is_file()}
    assert before == {path: content for path, content in files.items() if path.parent != results}


def test_without_a_checkpoint_evaluation_says_so(empty, capsys):
    main(["test", "--config", "tiny.yaml"])
    assert "before any training" in capsys.readouterr().out
    assert os.listdir(empty) == ["tiny.yaml"]
