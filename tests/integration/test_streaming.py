"""Runs on shards that lie on a server of S3, of which the cache holds a part at a time."""

import os
import signal
import socket
import subprocess
import sys
import time

import fsspec
import pytest
from commands.runs import refused
from standins import assert_same_weights, knl, tiny_config, write_config

from knlightning.commands.main import main


@pytest.fixture
def s3(monkeypatch, tmp_path):
    """A server on the loopback, with a bucket."""
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    given = {"ENDPOINT_URL": url, "ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}
    for name, value in given.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    command = [sys.executable, "-c", f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"]
    with open("server.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while "Running on" not in (tmp_path / "server.log").read_text():
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
        filesystem.mkdir("bucket")
        yield filesystem
    finally:
        server.kill()
        server.wait()


def killed(process, ready):
    """Kill a process as soon as something is there."""
    while process.poll() is None and not ready():
        time.sleep(0.01)
    process.kill()
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output


@pytest.mark.slow
def test_a_killed_run_on_s3_ends_like_one_left_alone(s3, tmp_path, capsys):
    write = ["write-shards", "--data=DigitsDataModule", "--out=s3://bucket/digits", "--images_per_shard=40"]

    def files():
        s3.invalidate_cache()
        return s3.find("bucket/digits", detail=True)

    assert "does not exist" in refused(capsys, *write, "--out=s3://none/digits")
    killed(knl(*write, cwd=tmp_path), lambda: len(files()) > 2)
    before = files()
    assert 2 < len(before) < 36
    main(write)
    after = files()
    assert len(after) == 36 + 9
    # what was written before the kill was not written again
    assert all(after[path]["LastModified"] == info["LastModified"] for path, info in before.items())

    config = tiny_config(max_epochs=2)
    config["last_checkpoint"] = {"every_n_steps": 5}
    sizes = {"train_size": 32, "eval_resize": 32, "eval_size": 32, "scaling": "unit", "batch_size": 64}
    cache = {"mixed_shards": 3, "cache_dir": "cache", "cache_gigabytes": 0.0005}
    config["data"] = {
        "class_path": "knlightning.data.StreamingDataModule",
        "init_args": {"root": "s3://bucket/digits", "num_workers": 2, **sizes, **cache},
    }
    write_config(tmp_path / "a.yaml", config)
    for folder, message in (("bucket/none", "There are no files train-*.parquet"), ("none/digits", "does not exist")):
        assert message in refused(capsys, "fit", "--config", "a.yaml", f"--data.root=s3://{folder}")
    main(["fit", "--config", "a.yaml", "--run_dir", "whole"])
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    killed(knl("fit", "--config", "a.yaml", "--run_dir", "killed", cwd=tmp_path), last.exists)
    # another process count, and a cache that is gone
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    resume = ["--ckpt_path", "last", "--data.num_workers", "1"]
    main(["fit", "--config", "a.yaml", "--run_dir", "killed", *resume])
    assert_same_weights(last, tmp_path / "whole" / "checkpoints" / "last.ckpt")
    copies = [path.stat().st_size for path in (tmp_path / "cache").glob("*.arrow")]
    assert 0 < sum(copies) <= 500_000 < sum(info["size"] for info in after.values())
    assert os.listdir(tmp_path / "cache").count("lock") == 1
