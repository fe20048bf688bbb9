import logging
import warnings

import pytest

from knlightning.commands.quiet import quiet

ADVICE = "The 'train_dataloader' does not have many workers which may be a bottleneck."


def test_advice_that_is_wrong_here_is_left_out():
    with quiet():
        warnings.warn(ADVICE, stacklevel=1)
    with pytest.warns(UserWarning, match="many workers"):
        warnings.warn(ADVICE, stacklevel=1)


def test_other_warnings_stay():
    with quiet(), pytest.warns(UserWarning, match="something new"):
        warnings.warn("something new", stacklevel=1)


def test_advertisements_are_left_out():
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with quiet():
        heard = [logger.filter(logger.makeRecord("", 20, "", 0, text, (), None)) for text in ("use litlogger", "news")]
    assert [bool(record) for record in heard] == [False, True]
