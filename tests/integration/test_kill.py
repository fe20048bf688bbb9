"""kill -9 at any moment costs the work since the last checkpoint, and nothing else."""

import csv
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from standins import assert_same_weights, knl, tiny_config, write_config, write_image_folder, write_parquet

from knlightning.commands.main import main

KILLS = int(os.environ.get("KNL_TEST_KILLS", "3"))
EPOCHS = 4 * KILLS  # enough for the last kill to come before the end


def kill_at_some_moment(process, checkpoint, moments):
    """Wait until a process has written a few checkpoints, and a little longer, then kill it."""
    for _ in range(moments.randint(1, 5)):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while process.poll() is None and (checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0) == before:
            time.sleep(0.002)
    time.sleep(moments.uniform(0, 0.05))
    process.kill()


@pytest.mark.slow
def test_killed_run_ends_like_one_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny_config(max_epochs=EPOCHS, limit_val_batches=1)
    config["last_checkpoint"] = {"every_n_steps": 5}
    write_config(tmp_path / "a.yaml", config)
    main(["fit", "--config", "a.yaml", "--run_dir", "whole"])

    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    moments = random.Random()
    for kill in range(KILLS):
        resume = ["--ckpt_path", "last"] if kill else []
        process = knl("fit", "--config", "a.yaml", "--run_dir", "killed", *resume, cwd=tmp_path)
        kill_at_some_moment(process, last, moments)
        output, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, output
    main(["fit", "--config", "a.yaml", "--run_dir", "killed", "--ckpt_path", "last"])
    assert_same_weights(last, tmp_path / "whole" / "checkpoints" / "last.ckpt")
    with (tmp_path / "killed" / "metrics.csv").open(newline="") as file:
        logged = Counter((row["step"], name) for row in csv.DictReader(file) for name, value in row.items() if value)
    for name in ("train/loss", "val/loss", "lr-SGD"):
        entries = [count for (_, key), count in logged.items() if key == name]
        assert entries == [1] * EPOCHS, f"{name} of the {EPOCHS} epochs was logged {entries} times"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ImageFolderDataModule", "StreamingDataModule"])
def test_a_run_whose_reader_was_killed_ends_like_one_left_alone(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if kind == "ImageFolderDataModule":
        write_image_folder(tmp_path / "data", count=200)
    else:
        write_parquet(tmp_path / "data")
    config = tiny_config(max_epochs=4, limit_train_batches=20)
    config["last_checkpoint"] = {"every_n_steps": 5}
    sizes = {"train_size": 32, "eval_resize": 32, "eval_size": 32, "batch_size": 16, "num_workers": 1}
    cache = {"cache_dir": "cache"} if kind == "StreamingDataModule" else {}
    config["data"] = {"class_path": f"knlightning.data.{kind}", "init_args": {"root": "data", **sizes, **cache}}
    write_config(tmp_path / "a.yaml", config)

    process = knl("fit", "--config", "a.yaml", cwd=tmp_path)
    last = tmp_path / "runs" / "a" / "0" / "checkpoints" / "last.ckpt"
    while not last.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    threads = Path(f"/proc/{process.pid}/task").glob("*/children")
    readers = [int(pid) for children in threads for pid in children.read_text().split()]
    for pid in readers:
        os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert readers
    assert process.returncode == 2, output
    assert "A process that reads images has died" in output
    assert "Traceback" not in output

    main(["fit", "--config", "a.yaml", "--ckpt_path", "auto"])
    main(["fit", "--config", "a.yaml", "--run_dir", "whole"])
    assert os.listdir(tmp_path / "runs" / "a") == ["0"]
    assert_same_weights(last, tmp_path / "whole" / "checkpoints" / "last.ckpt")
