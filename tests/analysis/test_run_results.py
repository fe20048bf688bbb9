import json

import pytest
import yaml
from analysis.written_run import write_run
from standins import tiny_config

from knlightning.analysis.run_results import read_run


def test_all_is_read(tmp_path):
    run = read_run(write_run(tmp_path / "runs" / "tiny" / "3"))
    assert (run.name, run.network, run.num_parameters) == ("tiny/3", "TinyNet", 480)
    assert (run.checkpoint, run.epoch, run.best) == ("best", 2, ("val/loss", 0.5))
    (evaluation,) = run.evaluations
    assert evaluation.scores == {"acc": 0.875, "loss": 0.25}
    assert [row["precision"] for row in evaluation.classes] == ["0.5", "", "0.5"]
    assert run.privacy == ""


def test_only_the_configuration_has_to_be_there(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_config()))
    run = read_run(tmp_path)
    assert (run.metrics, run.checkpoint, run.evaluations, run.best) == ({}, "", [], None)
    with pytest.raises(FileNotFoundError, match="name the directory of a run"):
        read_run(tmp_path / "nowhere")


def test_damaged_results_are_named(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "test" / "test.json").write_text("{")
    with pytest.raises(ValueError, match=r"test\.json is damaged .*run knl test again"):
        read_run(run)


@pytest.mark.parametrize(
    ("extra", "said"),
    [({}, "Differentially private: epsilon 1.500 at delta 1e-05"), ({"not_private": "from step 9"}, "from step 9")],
)
def test_privacy_is_stated(tmp_path, extra, said):
    run = write_run(tmp_path / "run")
    report = {
        "epsilon": 1.5,
        "target_delta": 1e-5,
        "accountant": "prv",
        "sampling": "poisson",
        "seeded": False,
        "max_grad_norm": 1.0,
        "plan": {"noise_multiplier": 1.0, "sampling_probability": 0.1},
        "history": [[1.0, 0.1, 12]],
        "segments": [["start", 1.0, 0.1, 12]],
    }
    (run / "privacy.json").write_text(json.dumps(report | extra))
    assert said in read_run(run).privacy
