from pathlib import Path

import pytest
from standins import TinyNet

from knlightning.commands.published import load_published
from knlightning.tasks import ClassificationTask


def test_only_networks_whose_weights_are_published_take_them():
    """That these do is in the tests of whole runs (integration/test_published.py)."""
    with pytest.raises(ValueError, match=r"--ckpt_path a\.pth holds weights alone.*another network, a TinyNet"):
        load_published(ClassificationTask(TinyNet(3)), Path("a.pth"))
