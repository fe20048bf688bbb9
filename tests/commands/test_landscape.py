import json

import numpy as np
import pytest
import torch
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


def test_plane_in_which_a_run_was_trained(folder, capsys):
    options = [*FEW, "--runs={kernel: runs/tiny/0}", "--trajectory=true", "--eigenvalues=false"]
    assert "must be runs of three or more checkpoints, with trajectory" in refused(capsys, *options)
    stored = torch.load(folder / "runs/tiny/0/checkpoints/last.ckpt", weights_only=True)
    for step in (2, 1):  # as if they had been kept
        moved = {name: value * (1 + step) for name, value in stored["state_dict"].items()}
        file = folder / f"runs/tiny/0/checkpoints/step-{step}.ckpt"
        torch.save(stored | {"state_dict": moved, "global_step": stored["global_step"] - step}, file)
    main(options)
    found = json.loads((folder / "out/kernel.json").read_text())
    assert np.abs(found["trajectory"]["places"]) == pytest.approx(np.array([[1, 0], [0.5, 0], [0, 0]]), abs=1e-5)
    assert found["trajectory"]["explained"] == pytest.approx([1, 0], abs=1e-6)
    assert found["rows"]["1"][1] == pytest.approx(found["loss"])
    assert (folder / "out/contours.png").is_file()


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
