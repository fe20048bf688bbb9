from matplotlib.figure import Figure

from knlightning.commands.output import save_figure, say, write_csv, write_text


def test_files_and_their_directories_are_made(tmp_path, capsys):
    folder = tmp_path / "a" / "b"
    write_text(folder / "a.md", "é\n")
    write_csv(folder / "a.csv", [{"x": 1, "y": "two words"}, {"x": 2, "y": ""}])
    save_figure(Figure(), folder / "a.png")
    say("done")
    assert (folder / "a.md").read_text(encoding="utf-8") == "é\n"
    assert (folder / "a.csv").read_text() == "x,y\n1,two words\n2,\n"
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == "done\n"
    assert {path.name for path in folder.iterdir()} == {"a.md", "a.csv", "a.png"}


def test_other_ranks_are_silent(tmp_path, capsys, monkeypatch):
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    write_text(tmp_path / "a.md", "a")
    say("done")
    assert not any(tmp_path.iterdir())
    assert capsys.readouterr().out == ""
