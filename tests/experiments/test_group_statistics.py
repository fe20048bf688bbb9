import pytest
import torch
from torch import nn

import experiments.group_statistics as experiment
from experiments.group_statistics import make_network
from knlightning.models import kernel_normalize
from knlightning.nn import GroupKNConv2d


@pytest.mark.parametrize(("groups", "expected"), [(None, [32, 32, 64]), (4, [4, 4, 4])])
def test_the_network_has_groups_and_is_converted_whole(groups, expected):
    network, report = kernel_normalize(make_network(groups), group_statistics="own")
    assert [m.groups for m in network.modules() if isinstance(m, GroupKNConv2d)] == expected
    assert report.left == report.replaced == {}
    assert network(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())


def test_a_run_scores_the_images_that_it_was_not_trained_on(monkeypatch):
    monkeypatch.setattr(experiment, "TRAINING_IMAGES", 128)
    torch.manual_seed(0)
    assert 0 < experiment.train(4, 0.05, "all", epochs=1) < 60  # two steps: little more than chance


def test_the_table(monkeypatch, capsys):
    monkeypatch.setattr(experiment, "train", lambda *args: 90.0 + torch.initial_seed())
    experiment.group_statistics(seeds=3)
    rows = capsys.readouterr().out.splitlines()
    assert rows[2] == "| depthwise | 0.05 | 91.0 ± 1.0 | 91.0 ± 1.0 | 91.0 ± 1.0 |"
    assert len(rows) == 5
