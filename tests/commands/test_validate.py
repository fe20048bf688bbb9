import pytest
from commands.runs import accuracy, column

from knlightning.commands.main import main


def test_the_last_checkpoint_has_the_last_score(folder, capsys):
    main(["validate", "--config", "tiny.yaml", "--ckpt_path", "last"])
    assert accuracy(capsys) == pytest.approx(column(folder / "runs" / "tiny" / "0", "val/acc")[-1][1], abs=5e-5)
