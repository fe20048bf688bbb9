import json

import pytest
from commands.runs import refused

from knlightning.commands import landscape as module
from knlightning.commands.main import main

FEW = ["landscape", "--num_images=6", "--points=3", "--draws=2", "--out=out"]


def test_what_is_computed_is_kept_and_what_is_missing_is_added(folder, monkeypatch, capsys):
    named = "--runs={kernel: runs/tiny/0}"
    main([*FEW, named, "--dimensions=1", "--eigenvalues=false"])
    assert "| kernel | " in capsys.readouterr().out
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["kernel.json", "lines.png", "sharpness.md"]
    line = json.loads((folder / "out/kernel.json").read_text())
    assert list(line["rows"]) == ["1"]
    assert line["rows"]["1"][1] == pytest.approx(line["loss"])
    main([*FEW, named])
    whole = json.loads((folder / "out/kernel.json").read_text())
    assert sorted(whole["rows"]) == ["0", "1", "2"]
    assert [whole[key] for key in ("loss", "ball")] == [line[key] for key in ("loss", "ball")]
    assert whole["rows"]["1"] == line["rows"]["1"]
    assert [row[1] for row in whole["rows"].values()] != whole["rows"]["1"]  # the other direction is another one
    assert len(whole["eigenvalues"]) == 2
    (folder / "out/contours.png").unlink()
    monkeypatch.setattr(module, "load", lambda *args, **kwargs: pytest.fail("computed again"))
    main([*FEW, named])
    assert (folder / "out/contours.png").is_file()
    assert (folder / "out/surfaces.png").is_file()
    message = refused(capsys, *FEW, named, "--seed=1")
    assert "out/kernel.json was computed with another seed" in message


def test_runs_need_no_names_and_data_may_have_moved(folder, capsys):
    options = ["--dimensions=1", "--eigenvalues=false", "--split=test"]
    main([*FEW, "--runs=[runs/tiny/0]", "--data={eval_batch_size: 3}", *options])
    assert "| tiny/0 | " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--runs=[]"], "--runs must be at least one directory of a run, got []"),
        (["--runs=[nowhere]"], "nowhere"),
        (["--runs=[x]", "--points=4"], "--points must be an odd number at least 3, got 4"),
    ],
)
def test_wrong_arguments(empty, capsys, args, said):
    assert said in refused(capsys, "landscape", *args)
