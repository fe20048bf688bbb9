import pytest
from commands.runs import refused

from knlightning.commands.main import main


def test_report_and_model_card_are_written_into_the_run(folder, capsys):
    run = "runs/tiny/0"
    main(["report", run])
    assert f"Report:     {run}/report.html\nModel card: {run}/README.md\n" in capsys.readouterr().out
    assert "Nothing is evaluated yet" in (folder / run / "report.html").read_text()
    main(["test", "--config", f"{run}/config.yaml", "--ckpt_path", "best"])
    (folder / run / "README.md").write_text("mine")
    main(["report", "--run", run])
    html = (folder / run / "report.html").read_text()
    assert "Scores on the test images" in html
    assert "Worst mistakes" in html
    assert "left as it is" in capsys.readouterr().out
    assert (folder / run / "README.md").read_text() == "mine"


@pytest.mark.parametrize("args", [["nowhere"], ["--run", "nowhere"]])
def test_what_is_no_run_is_refused(empty, capsys, args):
    assert "there is no nowhere/config.yaml" in refused(capsys, "report", *args)
