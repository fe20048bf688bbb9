import pytest

from knlightning.callbacks.harmless import Harmless


def fails(harmless, what="the picture"):
    with harmless(what):
        raise KeyError("no\x1b glyph")


def test_a_failure_is_said_once_and_goes_no_further():
    harmless = Harmless()
    with pytest.warns(UserWarning, match=r"Left out: the picture \(KeyError: 'no\\x1b glyph'\)\. The run goes on"):
        fails(harmless)
    fails(harmless)  # a warning would be an error here
    with pytest.warns(UserWarning, match="Left out: the log"):
        fails(harmless, "the log")


def test_an_interrupt_is_no_failure():
    with pytest.raises(KeyboardInterrupt), Harmless()("the picture"):
        raise KeyboardInterrupt
