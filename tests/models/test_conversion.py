import sys

import pytest
import torch
from torch import nn

from knlightning.checks import ArgumentError
from knlightning.models import converted, is_batch_independent
from knlightning.nn import KNConv2d


def unannotated(num_classes, width=4):
    return nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.BatchNorm2d(width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, num_classes),
    )


@pytest.mark.parametrize(
    ("name", "arguments", "shape"),
    [
        ("timm/test_resnet.r160_in1k", {"in_chans": 3}, ()),
        ("torchvision/shufflenet_v2_x0_5", None, ()),
        ("torchvision/lraspp_mobilenet_v3_large", None, (32, 32)),  # its function downloads weights by default
        (f"{__name__}.unannotated", {"width": 8}, ()),
    ],
)
def test_networks_by_their_name(name, arguments, shape):
    net = converted(name, 5, dropout_p=0.1, arguments=arguments)
    assert net.conversion.startswith("Kernel normalized: ")
    assert {m.dropout_p for m in net.modules() if isinstance(m, KNConv2d)} == {0.1}
    assert is_batch_independent(net)
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 5, *shape)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/resnet5", r"name must be a network of timm, see timm.list_models\(\), got 'timm/resnet5'"),
        ("torchvision/resnet5", r"name must be a network of torchvision, see torchvision.models.list_models\(\)"),
        ("keras/resnet50", "name must be timm/NAME, torchvision/NAME, or an import path, got 'keras/resnet50'"),
        ("no_such_module.net", "name must be timm/NAME, .* No module named 'no_such_module'"),
        ("torch.nn.no_such_net", "name must be timm/NAME, .* has no attribute 'no_such_net'"),
        ("torch.pi", "name must be the import path of a class or function"),
        ("builtins.dict", "name must be what makes a torch.nn.Module; this makes a dict"),
    ],
)
def test_what_is_no_network_is_refused(name, message):
    with pytest.raises(ArgumentError, match=message):
        converted(name)


def test_without_timm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"timm/resnet18 is a network of timm, .*: pip install timm"):
        converted("timm/resnet18")
