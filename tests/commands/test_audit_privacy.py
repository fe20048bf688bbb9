import pytest
from commands.runs import refused
from standins import PROJECT

from knlightning.commands.main import main


def test_a_private_run_is_audited_and_nothing_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["audit-privacy", "--config", str(PROJECT / "configs" / "digits_dp.yaml"), "--samples", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("pass")]) == 7
    assert not any(tmp_path.iterdir())


def test_a_failed_check_is_told_by_the_status(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    noiseless = ["--trainer.callbacks.target_epsilon=null", "--trainer.callbacks.noise_multiplier=0"]
    with pytest.raises(SystemExit) as stop:
        main(["audit-privacy", "--config", str(PROJECT / "configs" / "digits_dp.yaml"), "--samples=1", *noiseless])
    assert stop.value.code == 1
    assert "FAIL  noise of the stated scale" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "args", "said"),
    [
        ("quickstart", [], "audit-privacy needs a private run"),
        ("digits_dp", ["--ckpt_path", "last"], "an audit is of a run from its beginning"),
        ("digits_dp", ["--samples", "0"], "samples must be"),
    ],
)
def test_requests_that_cannot_be_met(capsys, config, args, said):
    assert said in refused(capsys, "audit-privacy", "--config", str(PROJECT / "configs" / f"{config}.yaml"), *args)
