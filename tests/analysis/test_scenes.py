import json
from pathlib import Path

import pytest
from standins import PROJECT

from knlightning.analysis.scenes import main

FEW = ["--data.train_scenes=16", "--data.eval_scenes=4", "--trainer.accelerator=cpu", "--pictures.every_n_epochs=0"]


@pytest.mark.slow
def test_runs_become_a_table_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    main(["--norms=[kernel,group]", "--epochs=1", "--seeds=1", "--max_halvings=0", *FEW])
    printed = capsys.readouterr().out
    for norm in ("kernel", "group"):
        result = Path(f"runs/scenes/fcn_knresnet8-{norm}-batch8/rate0.012-seed0/result.json")
        reached = json.loads(result.read_text())["accuracies"]
        assert f"| fcn_knresnet8 | {norm} | {100 * reached['test']:.2f} | 0.012 |\n" in printed
        assert 0 < reached["test"] < reached["mean_acc"] < reached["pixel_acc"] < 1
    for name in ("compare.png", "scenes.png"):
        assert Path("runs/scenes", name).read_bytes().startswith(b"\x89PNG")
