import pytest

from knlightning.commands.main import main


def test_the_help_of_a_task_names_our_networks_alone(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--model.help", "ClassificationTask"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "knresnet18" in printed
    assert "torch.nn" not in printed
    assert len(printed.splitlines()) < 170
