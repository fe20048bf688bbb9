"""Two processes on the CPU."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from standins import PROJECT, TESTS, TWO, assert_same_weights, run, scores, tiny_config, write_cifar100, write_config

from knlightning.commands import peers
from knlightning.commands.main import main
from knlightning.run_directory import numbered_runs


@pytest.mark.slow
def test_two_processes_train_together_and_count_every_image_once(tmp_path, monkeypatch, capsys):
    write_cifar100(tmp_path / "data", train=24, test=7)
    config = tiny_config(max_epochs=2, devices=1)
    config["data"] = {"class_path": "knlightning.data.CIFAR100DataModule", "init_args": {"batch_size": 3}}
    config["model"]["init_args"]["backbone"]["init_args"] = {"num_classes": 100}
    write_config(tmp_path / "a.yaml", config)
    output = run("fit", "--config", "a.yaml", *TWO, cwd=tmp_path)
    assert output.count("Best: ") == 1
    monkeypatch.chdir(tmp_path)
    (directory,) = numbered_runs("a")  # both have used the same
    assert (directory / "checkpoints" / "best.ckpt").is_file()
    run("fit", "--config", "a.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "3", *TWO, cwd=tmp_path)
    # 7 images: 4 in two batches for one process, 3 in a single batch for the other
    main(["test", "--config", "a.yaml", "--ckpt_path", "last"])
    alone = scores(directory)
    results = directory / "test"
    files = {path.name: path.read_bytes() for path in results.iterdir()}
    run("test", "--config", "a.yaml", "--ckpt_path", "last", *TWO, cwd=tmp_path)
    together = scores(directory)
    assert alone.keys() == {"test/loss", "test/acc", "test/acc_top5"}
    assert together == pytest.approx(alone, rel=1e-6)
    for name in ("predictions.csv", "classes.csv", "confusion.csv"):
        assert (results / name).read_bytes() == files[name]
    pages = [
        file.decode().count("<figure>") for file in (files["mistakes.html"], (results / "mistakes.html").read_bytes())
    ]
    assert pages[0] == pages[1] > 0


NODES = ["--trainer.devices=1", "--trainer.num_nodes=2"]
SOON = "from knlightning.commands import main, peers; peers.BEAT, peers.SILENT = 1.0, 10.0; main.main()"
"""The command, with less time until a process is taken for dead."""


def start_nodes(launcher, args, cwd):
    """Start two machines of one process each, on this one, as torchrun or srun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = []
    for node in range(2):
        env = {"PYTHONPATH": f"{PROJECT}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
        command = [sys.executable]
        if launcher == "torchrun":
            command += ["-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1"]
            command += ["--master-addr=127.0.0.1", f"--master-port={port}", "-m", "knlightning.commands.main"]
        else:
            command += ["-c", SOON]
            given = {"NTASKS": 2, "NTASKS_PER_NODE": 1, "NNODES": 2, "PROCID": node, "NODEID": node, "LOCALID": 0}
            given |= {"JOB_ID": 7, "JOB_NAME": "job", "JOB_NODELIST": "127.0.0.1"}
            env |= {f"SLURM_{name}": str(value) for name, value in given.items()} | {"MASTER_PORT": port}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        nodes.append(subprocess.Popen([*command, *args], cwd=cwd, env={**os.environ, **env}, **pipes))
    return nodes


def signal_node(node, signum):
    """Send a signal to all processes of a machine: first to what was started first, which could tell the others."""
    children = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
    for pid in (node.pid, *map(int, children)):
        os.kill(pid, signum)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "signum"), [("torchrun", signal.SIGKILL), ("srun", signal.SIGSTOP)])
def test_a_machine_that_is_lost_ends_the_others_and_the_run_goes_on(tmp_path, launcher, signum):
    """They agree on a directory. A process that is stopped stands for a machine without power or network."""
    assert peers.SILENT + 3 * peers.BEAT < 60
    write_config(tmp_path / "a.yaml", tiny_config(max_epochs=6, limit_val_batches=1))
    nodes = start_nodes(launcher, ["fit", "--config=a.yaml", *NODES], tmp_path)
    last = tmp_path / "runs" / "a" / "0" / "checkpoints" / "last.ckpt"
    while not last.exists():
        assert nodes[0].poll() is None, nodes[0].communicate()[0]
        time.sleep(0.01)
    signal_node(nodes[1], signum)
    lost = time.monotonic()
    output, _ = nodes[0].communicate(timeout=120)
    assert time.monotonic() - lost < 30
    signal_node(nodes[1], signal.SIGKILL)
    nodes[1].communicate()
    assert nodes[0].returncode == (75 if launcher == "srun" else 1), output  # torchrun has a status of its own
    told = "is lost" if signum == signal.SIGKILL else "Nothing was heard of the process of rank 1 for 10 seconds"
    assert told in output
    assert "this process ends too. Go on with: knl fit --config runs/a/0/config.yaml --ckpt_path last\n" in output
    assert "Interrupted." not in output

    nodes = start_nodes(launcher, ["fit", "--config=a.yaml", "--ckpt_path=auto", *NODES], tmp_path)
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert [text.count("Best: ") for text in outputs] == [1, 0]  # rank 0 alone tells
    run("fit", "--config", "a.yaml", "--run_dir", "whole", *TWO, cwd=tmp_path)
    assert_same_weights(last, tmp_path / "whole" / "checkpoints" / "last.ckpt")
    assert os.listdir(tmp_path / "runs" / "a") == ["0"]
