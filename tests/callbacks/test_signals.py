import os
import signal
import threading

import pytest
from standins import trainer

from knlightning.callbacks.signals import STOPPING, Stopped, StopSignals, stopped_by_signals


@pytest.fixture(autouse=True)
def _hangup():
    """A process that is started by nohup, as these tests may be, ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)])
def test_a_signal_ends_the_process_with_the_status_of_shells(signum, status):
    before = signal.getsignal(signum)
    with pytest.raises(Stopped) as stop, stopped_by_signals():
        os.kill(os.getpid(), signum)
    assert stop.value.code == status
    assert stop.value.signum == signum
    assert signal.getsignal(signum) == before


def test_a_watched_signal_is_noted_only():
    with stopped_by_signals():
        signals = StopSignals()
        signals.watch()
        assert signals.received_by_any(trainer(None)) == 0
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received_by_any(trainer(None)) == signal.SIGHUP


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopped_by_signals():
            StopSignals().watch()
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_forked_process_does_not_act_for_the_one_that_trains():
    with stopped_by_signals():
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143


def test_other_threads_handle_no_signals():
    before = [signal.getsignal(signum) for signum in STOPPING]
    seen = []

    def enter():
        with stopped_by_signals():
            seen.extend(signal.getsignal(signum) for signum in STOPPING)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == before
