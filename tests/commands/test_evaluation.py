import json

from commands.runs import refused

from knlightning.commands.main import main


def test_results_go_where_they_are_asked_for_and_replace_nothing_else(empty, capsys):
    (empty / "mine").mkdir()
    (empty / "mine" / "notes").touch()
    assert "--out mine must be" in refused(capsys, "test", "--config", "tiny.yaml", "--out", "mine")
    for _ in range(2):
        main(["test", "--config", "tiny.yaml", "--out", "there"])
    assert "Results: there" in capsys.readouterr().out
    assert json.loads((empty / "there" / "test.json").read_text())["checkpoint"] is None
