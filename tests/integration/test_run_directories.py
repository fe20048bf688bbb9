"""Runs that are moved, copied, stopped, damaged, started twice or in vain: no work is lost, and none is mixed up."""

import shutil
import signal

import pytest
import torch
import yaml
from commands.runs import refused, rows
from standins import assert_same_weights, tiny_config, weights, write_config

from knlightning.commands.main import main
from knlightning.run_directory import locked

FEW = {"limit_train_batches": 4, "limit_val_batches": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with tiny.yaml and one run of one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    write_config(folder / "tiny.yaml", tiny_config(max_epochs=1, **FEW))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["fit", "--config", "tiny.yaml"])
    return folder


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """A copy of it, to work in."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A folder with tiny.yaml alone."""
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "tiny.yaml", tiny_config(max_epochs=1, **FEW))
    return tmp_path


def step(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


def fit(*args):
    main(["fit", "--config", "tiny.yaml", *args])


# ---- places


@pytest.mark.parametrize("copied", [False, True])
def test_the_configuration_of_a_run_means_the_folder_it_lies_in(folder, copied):
    old, new = folder / "runs" / "tiny" / "0", folder / "kept"
    shutil.copytree(old, new)
    if not copied:
        shutil.rmtree(old)
    main(["fit", "--config", "kept/config.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "2"])
    assert step(new) == 8
    assert step(old) == 4 if copied else not old.exists()
    assert yaml.safe_load((new / "config.yaml").read_text())["run_dir"] == "kept"


def test_the_checkpoint_of_another_run_starts_a_new_one(folder):
    old = folder / "runs" / "tiny" / "0"
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    fit("--ckpt_path", "runs/tiny/0/checkpoints/last.ckpt", "--trainer.max_epochs", "2")
    assert step(folder / "runs" / "tiny" / "1") == 8
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before
    fit("--ckpt_path", "runs/tiny/0/checkpoints/last.ckpt", "--trainer.max_epochs", "2", "--run_dir", "runs/tiny/0")
    assert step(old) == 8  # as asked


def test_auto_starts_a_run_or_goes_on_with_it(folder):
    for epochs in (1, 2):
        fit("--ckpt_path", "auto", "--run_dir", "one", "--trainer.max_epochs", str(epochs))
        assert step(folder / "one") == 4 * epochs
    fit("--ckpt_path", "auto", "--trainer.max_epochs", "3")  # the newest
    assert step(folder / "runs" / "tiny" / "0") == 12


def test_the_command_line_wins_wherever_it_stands(folder):
    main(["fit", "--trainer.max_epochs", "2", "--run_dir", "early", "--config", "tiny.yaml"])
    assert step(folder / "early") == 8


def test_tilde_and_variables_in_a_configuration(folder, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setenv("PLACE", "place")
    write_config(folder / "tiny.yaml", tiny_config(max_epochs=1, **FEW) | {"run_dir": "~/$PLACE/x"})
    fit()
    run = folder / "home" / "place" / "x"
    names = {path.name.partition(".")[0] for path in run.iterdir()}
    assert names == {"config", "checkpoints", "metrics", "events", "versus_images"}
    assert not (folder / "~").exists()
    assert "--ckpt_path last" in refused(capsys, "fit", "--config", "tiny.yaml")
    write_config(folder / "tiny.yaml", tiny_config(max_epochs=1, **FEW) | {"run_dir": "$NOWHERE_AT_ALL/x"})
    assert "NOWHERE_AT_ALL" in refused(capsys, "fit", "--config", "tiny.yaml")


# ---- starts in vain


@pytest.mark.parametrize(
    "args",
    [
        ["--model.optimizer.lr", "-1"],
        ["--model.optimizer.lr", "-1", "--run_dir", "a/b"],
        ["--model.backbone.num_classes", "3", "--run_dir", "a/b"],
        ["--data", "knlightning.data.ImageFolderDataModule", "--data.root", "nowhere"],
        ["--best_checkpoint.monitor", "val/no"],
    ],
)
def test_a_failed_start_leaves_nothing(empty, capsys, args):
    refused(capsys, "fit", "--config", "tiny.yaml", *args)
    assert [path.name for path in empty.iterdir()] == ["tiny.yaml"]


def test_a_failed_start_changes_no_run_that_is_there(folder, capsys):
    run = folder / "runs" / "tiny" / "0"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "events" not in path.name}
    refused(capsys, "fit", "--config", "tiny.yaml", "--ckpt_path", "last", "--model.optimizer.lr", "-1")
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "events" not in path.name}
    assert after == before


def test_a_fast_dev_run_leaves_nothing(empty):
    for place in ([], ["--run_dir", "a/b"]):
        fit("--trainer.fast_dev_run", "true", *place)
        assert [path.name for path in empty.iterdir()] == ["tiny.yaml"]


def test_nothing_left_to_train_makes_no_run(folder, capsys):
    fit("--ckpt_path", "runs/tiny/0/checkpoints/last.ckpt")
    assert "no run was made" in capsys.readouterr().out
    assert [path.name for path in (folder / "runs" / "tiny").iterdir()] == ["0"]


# ---- two processes, and signals


def test_a_run_in_use_is_refused(folder, capsys):
    with locked(folder / "runs" / "tiny" / "0"):
        for ckpt_path in ("last", "auto"):
            message = refused(capsys, "fit", "--config", "tiny.yaml", "--ckpt_path", ckpt_path)
            assert "runs/tiny/0 is in use by process" in message
        main(["validate", "--config", "tiny.yaml", "--ckpt_path", "last"])  # only looks


@pytest.mark.parametrize(
    ("signum", "accumulate", "written"), [(signal.SIGTERM, 1, 3), (signal.SIGHUP, 2, 2), (signal.SIGUSR1, 1, 3)]
)
def test_a_stopped_run_goes_on_where_it_was(empty, capsys, signum, accumulate, written):
    trainer = {"max_epochs": 2, "limit_train_batches": 6, "limit_val_batches": 1}
    config = tiny_config(**trainer, accumulate_grad_batches=accumulate)
    write_config(empty / "tiny.yaml", config)
    stop = {"class_path": "standins.Signal", "init_args": {"step": written - 1, "signum": int(signum)}}
    config["trainer"]["callbacks"] = [stop]
    write_config(empty / "stop.yaml", config)
    fit("--run_dir", "whole")
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "stop.yaml", "--run_dir", "parts"])
    assert end.value.code == 128 + signum
    assert step(empty / "parts") == written
    output = capsys.readouterr().out
    assert f"Stopped by {signum.name}. Go on with: knl fit --config parts/config.yaml --ckpt_path last" in output
    fit("--run_dir", "parts", "--ckpt_path", "last")
    assert_same_weights(empty / "parts/checkpoints/last.ckpt", empty / "whole/checkpoints/last.ckpt")


@pytest.mark.parametrize("again", [{}, {"SLURM_RESTART_COUNT": "1", "SLURM_JOB_ID": "78"}])
def test_a_requeued_job_goes_on_by_the_same_command(empty, monkeypatch, capsys, again):
    scontrol = empty / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $@ >> {empty}/asked\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(empty), prepend=":")
    for name, value in {"JOB_ID": "77", "NTASKS": "1", "JOB_NAME": "job", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_NODEID", "0")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "localhost")
    stop = {"class_path": "standins.Signal", "init_args": {"step": 5, "signum": int(signal.SIGUSR1)}}
    write_config(empty / "tiny.yaml", tiny_config(max_epochs=2, callbacks=[stop], **FEW))
    with pytest.raises(SystemExit) as end:
        fit("--run_dir", "one")
    assert end.value.code == 138
    assert (empty / "asked").read_text() == "requeue 77\n"
    for name, value in again.items():
        monkeypatch.setenv(name, value)
    fit("--run_dir", "one")
    assert step(empty / "one") == 8
    monkeypatch.setenv("SLURM_JOB_ID", "79")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert "auto" in refused(capsys, "fit", "--config", "tiny.yaml", "--run_dir", "one")  # another job


# ---- damage


def damaged(folder, change):
    path = folder / "runs" / "tiny" / "0" / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


@pytest.mark.parametrize("command", ["fit", "test", "export"])
def test_a_flipped_byte_is_never_used(folder, capsys, command):
    path = folder / "runs" / "tiny" / "0" / "checkpoints" / "last.ckpt"
    values = weights(path)["backbone.head.weight"].numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(values) + 5] ^= 64
    path.write_bytes(content)
    to = ["--to", "out"] if command == "export" else []
    message = refused(capsys, command, "--config", "tiny.yaml", "--ckpt_path", "last", *to)
    assert "runs/tiny/0/checkpoints/last.ckpt is damaged" in message
    assert "checksum" in message


BOMB = [0] * 10
for _ in range(12):
    BOMB = [BOMB] * 10


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("state_dict"),
        lambda content: content.pop("loops"),
        lambda content: content["loops"].clear(),
        lambda content: content["loops"]["fit_loop"].update(state_dict=3),
        lambda content: content.update(optimizer_states=[{}]),
        lambda content: content.update(optimizer_states=[]),
        lambda content: content.update(lr_schedulers=[{"_step_count": "two"}]),
        lambda content: content["callbacks"].update(RunConfig={"config": BOMB}),
        lambda content: content["callbacks"].update(RunConfig={"config": {"seed": torch.ones(2)}}),
        lambda content: content["callbacks"].update(RunConfig=5),
        lambda content: content["callbacks"].update(dict.fromkeys(content["callbacks"], 5)),
        lambda content: content["state_dict"].clear(),
        lambda content: content["state_dict"].update({"backbone.head.weight": torch.ones(1)}),
        lambda content: content.update(epoch="one"),
        lambda content: content.update({"pytorch-lightning_version": "no version"}),
    ],
)
def test_other_damage_is_named(folder, capsys, change):
    path = damaged(folder, change)
    message = refused(capsys, "fit", "--config", "tiny.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert path.name in message


def test_what_a_checkpoint_says_does_not_command_the_terminal(folder, capsys):
    def change(content):
        next(v for k, v in content["callbacks"].items() if k == "RunConfig")["config"]["seed_everything"] = "\x1b[2Jx"

    damaged(folder, change)
    main(["validate", "--config", "tiny.yaml", "--ckpt_path", "last"])
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert r"\x1b[2Jx" in output


@pytest.mark.filterwarnings("ignore:.*metrics.csv is damaged")
def test_a_damaged_log_is_put_aside_and_the_run_goes_on(folder):
    run = folder / "runs" / "tiny" / "0"
    (run / "metrics.csv").write_text("<<<<<<< HEAD\n" + (run / "metrics.csv").read_text())
    before = (run / "metrics.csv").read_bytes()
    fit("--ckpt_path", "last", "--trainer.max_epochs", "2")
    (aside,) = run.glob("metrics.damaged-*.csv")
    assert aside.read_bytes() == before
    assert {int(row["step"]) for row in rows(run)} == {4, 7}
