import pytest
from commands.runs import refused
from standins import PROJECT, tiny_config, write_config

from knlightning.commands.main import main


@pytest.fixture
def private(tmp_path, monkeypatch):
    """A folder with private.yaml, and the arguments of an audit of it."""
    monkeypatch.chdir(tmp_path)
    init_args = {"noise_multiplier": 1.0, "target_delta": 1e-4, "accountant": "rdp"}
    callback = {"class_path": "knlightning.privacy.DifferentialPrivacy", "init_args": init_args}
    write_config(tmp_path / "private.yaml", tiny_config(callbacks=[callback], max_epochs=1))
    return tmp_path, ["audit-privacy", "--config=private.yaml", "--samples=2", "--model.backbone.dropout_p=0"]


def test_a_private_run_is_audited_and_nothing_written(private, capsys):
    folder, args = private
    main(args)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("pass")]) == 11
    assert [path.name for path in folder.iterdir()] == ["private.yaml"]


def test_a_failed_check_is_told_by_the_status(private, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*private[1], "--trainer.callbacks.noise_multiplier=0"])
    assert stop.value.code == 1
    assert "FAIL  noise of the stated scale" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "args", "said"),
    [
        ("quickstart", [], "audit-privacy needs a private run"),
        ("digits_dp", ["--ckpt_path", "last"], "an audit is of a run from its beginning"),
        ("digits_dp", ["--samples", "0"], "samples must be"),
        ("digits_dp", ["--canaries", "-1"], "canaries must be"),
    ],
)
def test_requests_that_cannot_be_met(capsys, config, args, said):
    assert said in refused(capsys, "audit-privacy", "--config", str(PROJECT / "configs" / f"{config}.yaml"), *args)
