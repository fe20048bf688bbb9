"""Processes that torchrun or SLURM has started for one run: they agree on a directory, and notice when one is gone."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread, Timer
from typing import Self

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined] # by a star import

from knlightning.internals.torch import is_loss_of_peer

BEAT = 5.0
"""Seconds between two signs of life."""
SILENT = 40.0
"""Seconds without a sign of life after which a process is taken for dead."""
STATUS = 75
"""Exit status when another process is gone; that of `EX_TEMPFAIL`: the same command goes on."""
LOST = "lost"
"""Key under which the process of rank zero tells the others which process is gone."""


class PeerLost(SystemExit):
    """The end of a process because another one is gone, with status `STATUS`."""

    def __init__(self) -> None:
        super().__init__(STATUS)


class Peers:
    """The processes of a run, of which this is one.

    Args:
        store: What they share.
        rank: Number of this process.
        count: Number of all.
    """

    def __init__(self, store: Store, rank: int, count: int) -> None:
        self._store, self._rank, self._count = store, rank, count

    @classmethod
    def found(cls) -> Self | None:
        """Meet the other processes, if torchrun or SLURM has started several; else return None."""
        for launcher in (TorchElasticEnvironment, SLURMEnvironment):
            if launcher.detect() and (environment := launcher()).world_size() > 1:
                rank, count = environment.global_rank(), environment.world_size()
                os.environ["MASTER_ADDR"] = environment.main_address
                os.environ["MASTER_PORT"] = str(environment.main_port)
                store, *_ = next(rendezvous("env://", rank, count))  # as Lightning does later: a server is shared
                attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
                return cls(PrefixStore(f"knl/{attempt}", store), rank, count)
        return None

    def agree(self, choose: Callable[[], Path]) -> Path:
        """Return what the process of rank zero chooses.

        Args:
            choose: Called in that process alone.
        """
        if self._rank == 0:
            self._store.set("path", str(choose()))
        return Path(self._store.get("path").decode())

    @contextmanager
    def watched(self, how_to_go_on: Callable[[], str]) -> Iterator[None]:
        """Give signs of life, and end this process with status `STATUS` if another one is gone.

        Args:
            how_to_go_on: Says what to do then.

        Raises:
            PeerLost: If an error in the block says that a connection is lost.
        """
        ended = Event()
        watch = Thread(target=self._watch, args=(ended, how_to_go_on), daemon=True)
        watch.start()
        try:
            yield
            self._store.add("ended", 1)
            until = time.monotonic() + SILENT
            while self._rank == 0 and self._store.add("ended", 0) < self._count and time.monotonic() < until:
                time.sleep(0.1)  # what they share may end with this process
        except Exception as error:
            if not is_loss_of_peer(error):
                raise
            _say(f"The connection to another process is lost ({str(error).partition('. ')[0]})", how_to_go_on)
            raise PeerLost from None
        finally:
            ended.set()

    def _watch(self, ended: Event, how_to_go_on: Callable[[], str]) -> None:
        def end(what: str) -> None:
            if not ended.is_set():
                _say(what, how_to_go_on)
                os._exit(STATUS)  # the process may wait for the lost one without end

        heard = dict.fromkeys(range(self._count) if self._rank == 0 else [0], (0, time.monotonic()))
        while not ended.wait(BEAT):
            limit = Timer(SILENT, end, ["The process of rank 0 does not answer"])
            limit.daemon = True
            limit.start()
            what = self._lost(heard)
            limit.cancel()
            if what:
                if self._rank == 0:
                    ended.wait(2 * BEAT)  # the others read it
                end(what)
                break

    def _lost(self, heard: dict[int, tuple[int, float]]) -> str:
        """Give a sign of life, and say which process is gone; "" if none is known to be.

        Args:
            heard: Of each process that is listened to, its signs of life so far, and when the last of them came.
        """
        try:
            self._store.add(f"alive {self._rank}", 1)
            if self._rank and self._store.check([LOST]):
                return self._store.get(LOST).decode()
            for rank, (before, moment) in heard.items():
                now = self._store.add(f"alive {rank}", 0)
                if now != before:
                    heard[rank] = now, time.monotonic()
                elif time.monotonic() - moment > SILENT:
                    what = f"Nothing was heard of the process of rank {rank} for {SILENT:.0f} seconds"
                    if self._rank == 0:
                        self._store.set(LOST, what)
                    return what
        except RuntimeError as error:
            return f"The process of rank 0 has ended ({error})"
        return ""


def _say(what: str, how_to_go_on: Callable[[], str]) -> None:
    print(f"{what}: this process ends too.{how_to_go_on()}", file=sys.stderr, flush=True)
