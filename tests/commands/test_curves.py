from commands.runs import refused

from knlightning.commands.main import main


def test_curves_become_a_picture(tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text("step,val/loss,val/acc,epoch\n44,0.7,0.75,0\n89,0.5,0.8,1\n")
    out = tmp_path / "new" / "curves.png"
    main(["curves", f"--runs=[{tmp_path}, {tmp_path}]", f"--out={out}"])
    assert out.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{out}\n"


def test_a_directory_without_metrics_is_named(capsys):
    assert "no nowhere/metrics.csv: name the directory of a run" in refused(capsys, "curves", "--runs=[nowhere]")
