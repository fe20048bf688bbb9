"""Signals that ask a run to end: it writes a checkpoint first, and says which signal it was."""

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning.pytorch import Trainer

STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""What kill and schedulers send, what a terminal sends that is closed, and what schedulers send before a time limit."""


class Stopped(SystemExit):
    """The end of a process that a signal asks for. Its status is that of shells, 128 + the number of the signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signal.Signals(signum)


class StopSignals:
    """Notes signals, until there is a moment at which a run can end."""

    def __init__(self) -> None:
        self._received = 0

    def watch(self) -> None:
        """Note signals from now on, in the place of whoever has handled them so far."""
        self._received = 0
        _handle(self._note)

    def received_by_any(self, trainer: Trainer) -> int:
        """Return the signal that came in any process of a run; 0 if there was none.

        Args:
            trainer: Its processes must all ask at the same place.
        """
        if trainer.world_size == 1:
            return self._received
        stop = trainer.strategy.reduce_boolean_decision(self._received > 0, all=False)
        return (self._received or signal.SIGTERM) if stop else 0

    def _note(self, signum: int) -> None:
        self._received = signum


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let signals end the process as an interrupt does: what is begun is put back, and nothing is printed.

    Raises:
        Stopped: If a signal comes.
    """
    before = {signum: signal.getsignal(signum) for signum in STOPPING}

    def stop(signum: int) -> None:
        raise Stopped(signum)

    _handle(stop)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for signum, handler in before.items():
                signal.signal(signum, handler)


def _handle(react: Callable[[int], None]) -> None:
    """Handle the signals, except those that are ignored, as `nohup` does."""
    if threading.current_thread() is not threading.main_thread():
        return
    own = os.getpid()

    def handler(signum: int, frame: FrameType | None) -> Any:
        if os.getpid() != own:  # a process that loads data, and ends with the one that trains
            if signum == signal.SIGTERM:
                os._exit(128 + signum)
            return
        if signum == signal.SIGHUP:
            _leave_terminal()
        react(signum)

    for signum in STOPPING:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, handler)


def _leave_terminal() -> None:
    """Write to a terminal that is closed no longer: that would be an error."""
    for file in (1, 2):
        try:
            gone = stat.S_ISCHR(os.fstat(file).st_mode) and not os.isatty(file)
        except OSError:
            continue
        if gone:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, file)
            os.close(nowhere)
