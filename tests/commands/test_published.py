import pytest
import torch
from lightning.pytorch import LightningModule
from standins import TinyNet
from torch import nn

from knlightning.commands.published import load_published
from knlightning.tasks import ClassificationTask


def test_all_of_the_network_must_fit(capsys, tmp_path):
    """More is in the tests of whole runs (integration/test_published.py)."""
    task, path = ClassificationTask(TinyNet(3)), str(tmp_path / "a.pth")
    torch.save(TinyNet(3).state_dict() | {"head.bias": torch.ones(3)}, path)
    load_published(task, path)
    assert torch.equal(task.backbone.head.bias, torch.ones(3))
    assert "a.pth holds weights, without a run (2 tensors taken)" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"misshapen: head.weight is \(3, 48\), needed \(4, 48\)"):
        load_published(ClassificationTask(TinyNet(4)), path)


def test_a_task_without_a_backbone():
    task = LightningModule()
    task.net = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"a\.pth holds weights alone, and a LightningModule has no backbone"):
        load_published(task, "a.pth")
