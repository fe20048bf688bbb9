import os
import threading
import time

import pytest
from standins import PROJECT, TESTS, assert_same_weights, knl, tiny_config, write_config

from knlightning.analysis import parallel as module
from knlightning.analysis.parallel import Pool, _call_there
from knlightning.checks import ArgumentError
from knlightning.commands.main import main


def test_without_ray_calls_are_made_one_after_the_other_in_this_thread(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with Pool() as pool:
        found = pool.map(lambda item: (item, threading.current_thread()), iter("ab"))
        assert next(found) == ("a", threading.main_thread())  # and b when it is asked for
        assert pool.call(divmod, 7, 2) == (3, 1)
    for arguments in ({"parallel": 2}, {"cluster": "auto"}):
        with pytest.raises(
            ArgumentError, match=r"parallel must be 1 without Ray.*pip install 'knlightning\[cluster\]'"
        ):
            Pool(**arguments)
    with pytest.raises(ArgumentError, match="parallel must be a whole number at least 1, got 0"):
        Pool(0)


def test_a_call_waits_for_a_directory_that_a_dying_worker_holds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    waited = []

    def use(name):
        if len(waited) < 3:
            raise BlockingIOError(f"{name} is in use")
        return os.getcwd()

    monkeypatch.setattr(time, "sleep", waited.append)
    assert _call_there("/", use, ("run",)) == "/"
    monkeypatch.setattr(module, "RELEASED_AFTER", -1)
    waited.clear()
    with pytest.raises(BlockingIOError, match="run is in use"):
        _call_there("/", use, ("run",))


@pytest.mark.slow
def test_a_node_that_is_killed_costs_what_was_not_in_the_last_checkpoint(tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{PROJECT}{os.pathsep}{TESTS}")
    config = tiny_config(max_epochs=40, limit_val_batches=1, limit_test_batches=1)
    write_config(tmp_path / "tiny.yaml", config | {"last_checkpoint": {"every_n_steps": 5}})
    search = ["sweep-lr", "--config=tiny.yaml", "--start=0.5", "--seeds=1", "--max_halvings=1"]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        node = cluster.add_node(num_cpus=1)
        process = knl(*search, "--out=killed", "--parallel=2", f"--cluster={cluster.address}", cwd=tmp_path)
        runs = [tmp_path / "killed" / f"rate{rate}-seed0" for rate in (0.5, 0.25)]
        while process.poll() is None and not all((run / "checkpoints" / "last.ckpt").exists() for run in runs):
            time.sleep(0.01)
        cluster.remove_node(node, allow_graceful=False)
        assert not any((run / "result.json").exists() for run in runs)  # both were going on
        output, _ = process.communicate(timeout=600)
    finally:
        cluster.shutdown()
    assert process.returncode == 0, output
    main([*search, "--out=whole"])
    for run in runs:
        last = f"{run.name}/checkpoints/last.ckpt"
        assert_same_weights(f"killed/{last}", f"whole/{last}")
    results = (tmp_path / "killed" / "results.csv").read_text().splitlines()
    assert sorted(line.partition(",")[0] for line in results[1:]) == sorted(
        str(run.relative_to(tmp_path)) for run in runs
    )
