import os
import threading
import time
from pathlib import Path

import pytest
from torch.distributed import HashStore

from knlightning.commands import peers as module
from knlightning.commands.peers import PeerLost, Peers


@pytest.fixture
def pair(monkeypatch):
    """Two processes, of which the second one is the others' affair; and the statuses with which they end."""
    monkeypatch.setattr(module, "BEAT", 0.01)
    monkeypatch.setattr(module, "SILENT", 0.2)
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    store = HashStore()
    return [Peers(store, rank, 2) for rank in range(2)], ended


def go_on():
    return " Go on."


def test_all_get_the_directory_that_rank_zero_chooses(pair):
    (first, second), _ = pair
    assert first.agree(lambda: Path("runs/a/0")) == Path("runs/a/0")
    assert second.agree(lambda: pytest.fail("chosen twice")) == Path("runs/a/0")


def test_one_process_has_no_peers(monkeypatch):
    assert Peers.found() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Peers.found() is None


@pytest.mark.parametrize("present", [0, 1])
def test_a_process_of_which_nothing_is_heard_ends_the_other(pair, capsys, present):
    peers, ended = pair
    with peers[present].watched(go_on):
        until = time.monotonic() + 10
        while not ended and time.monotonic() < until:
            time.sleep(0.01)
    assert ended == [75]
    assert f"Nothing was heard of the process of rank {1 - present} for 0 seconds" in (err := capsys.readouterr().err)
    assert "this process ends too. Go on.\n" in err


def test_processes_that_live_leave_each_other_alone(pair):
    peers, ended = pair

    def work(peer):
        with peer.watched(go_on):
            time.sleep(0.4)

    threads = [threading.Thread(target=work, args=(peer,)) for peer in peers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not ended


def test_what_rank_zero_has_noticed_ends_the_others(pair, capsys):
    (_, second), ended = pair
    second._store.set(module.LOST, "Nothing was heard of the process of rank 7")
    with second.watched(go_on):
        time.sleep(0.1)
    assert ended[0] == 75
    assert "Nothing was heard of the process of rank 7: this process ends too. Go on." in capsys.readouterr().err


def test_a_lost_connection_ends_the_process(pair, capsys):
    (first, _), _ = pair
    with pytest.raises(PeerLost) as end, first.watched(go_on):
        raise RuntimeError("[gloo/pair.cc:545] Connection closed by peer. Check the logs.")
    assert end.value.code == 75
    assert capsys.readouterr().err == (
        "The connection to another process is lost ([gloo/pair.cc:545] Connection closed by peer): this process ends"
        " too. Go on.\n"
    )
    with pytest.raises(RuntimeError, match="another"), first.watched(go_on):
        raise RuntimeError("another")
