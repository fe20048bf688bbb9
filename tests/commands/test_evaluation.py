import json
from types import SimpleNamespace

from commands.runs import refused

from knlightning.commands.evaluation import EvaluationCLI
from knlightning.commands.main import main


def test_results_go_where_they_are_asked_for_and_replace_nothing_else(empty, capsys):
    (empty / "mine").mkdir()
    (empty / "mine" / "notes").touch()
    assert "--out mine must be" in refused(capsys, "test", "--config", "tiny.yaml", "--out", "mine")
    for _ in range(2):
        main(["test", "--config", "tiny.yaml", "--out", "there"])
    assert "Results: there" in capsys.readouterr().out
    assert json.loads((empty / "there" / "test.json").read_text())["checkpoint"] is None


def test_scores_of_several_loaders_are_all_told(capsys):
    """Lightning returns those of each loader apart; a datamodule of one's own may have several."""
    scores = [{"test/acc/dataloader_idx_0": 0.5}, {"test/acc/dataloader_idx_1": 0.25}]
    cli = SimpleNamespace(
        command="test", out=None, trainer=SimpleNamespace(test=lambda **_: scores), trainer_arguments=dict
    )
    EvaluationCLI.execute(cli)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["test/acc/dataloader_idx_0  0.5000", "test/acc/dataloader_idx_1  0.2500"]
