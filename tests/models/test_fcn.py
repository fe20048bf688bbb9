import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from knlightning import models
from knlightning.analysis.measure import bytes_kept
from knlightning.models import (
    fcn_knresnet8,
    fcn_knresnet18,
    fcn_knresnet34,
    fcn_knresnet50,
    fcn_resnet8,
    fcn_resnet18,
    fcn_resnet50,
)
from knlightning.nn import KernelNorm2d, KNConv2d, kernel_norm, kn_conv


@pytest.mark.parametrize("size", [(1, 1), (5, 2), (31, 67), (65, 33)])
@pytest.mark.parametrize("make", [fcn_knresnet8, fcn_knresnet18, fcn_knresnet50, fcn_resnet8, fcn_resnet50])
def test_images_of_any_size(make, size):
    with torch.no_grad():
        logits = make(num_classes=5).eval()(torch.rand(1, 3, *size))
    assert logits.shape == (1, 5, *size)
    assert logits.isfinite().all()


@pytest.mark.parametrize(("name", "stride"), [("fcn_knresnet8", 4), ("fcn_knresnet34", 32), ("fcn_resnet8", 4)])
def test_output_stride(name, stride):
    model = getattr(models, name)(num_classes=3).eval()
    with torch.no_grad():
        assert model.backbone(torch.rand(1, 3, 64, 128)).shape[2:] == (64 // stride, 128 // stride)


def test_fcn_knresnet50_is_the_network_that_its_description_says():
    torch.manual_seed(0)
    model = fcn_knresnet50(num_classes=6, dropout_p=0.0).double().eval()
    weights = {name: nn.init.normal_(p, std=0.05) for name, p in model.named_parameters()}

    def conv(x, name, **geometry):
        return kn_conv(x, weights[f"{name}.weight"], weights[f"{name}.bias"], dropout_p=0.0, **geometry)

    images = torch.rand(2, 3, 65, 50, dtype=torch.float64)
    x = F.max_pool2d(conv(images, "backbone.0.stem.0", stride=2, padding=3), 3, 2, 1)
    for i, blocks in enumerate((4, 4, 4, 3)):
        if i > 0:
            x = F.max_pool2d(conv(x.relu(), f"backbone.0.transitions.{i - 1}.1", padding=1), 3, 2, 1)
        for block in range(blocks):
            stem = f"backbone.0.stages.{i}.{block}"
            inner = conv(x.relu(), f"{stem}.conv1", padding=1).relu()
            x = x + conv(conv(inner, f"{stem}.conv2", padding=1).relu(), f"{stem}.conv3")
    x = kernel_norm(conv(x.relu(), "backbone.1.1", padding=1), 1, dropout_p=0.0).relu()
    x = F.conv2d(x, weights["head.2.weight"], weights["head.2.bias"])
    assert x.shape == (2, 6, 3, 2)
    expected = F.interpolate(x, (65, 50), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


def test_fcn_resnet_is_torchvisions_trunk_and_the_head_that_its_description_says():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=5)
    ours = fcn_resnet18(num_classes=6).eval()
    missing, _ = ours.backbone.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing
    theirs.avgpool, theirs.fc = nn.Identity(), nn.Identity()
    images = torch.rand(2, 3, 65, 50)
    x = theirs.eval()(images).view(2, 512, 3, 2)
    conv, norm, classifier = ours.head[0], ours.head[1][0], ours.head[3]
    assert (conv.bias, conv.kernel_size, classifier.bias.shape) == (None, (3, 3), (6,))
    x = F.conv2d(x, conv.weight, padding=1)
    x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias).relu()
    x = F.conv2d(x, classifier.weight, classifier.bias)
    torch.testing.assert_close(ours(images), F.interpolate(x, (65, 50), mode="bilinear", align_corners=False))


def test_dropout_probabilities():
    model = fcn_knresnet34()
    assert {m.dropout_p for m in model.modules() if isinstance(m, KNConv2d)} == {0.1}
    assert [m.dropout_p for m in model.modules() if isinstance(m, KernelNorm2d)] == [0.5]
    assert [m.dropout_p for m in fcn_knresnet8(dropout_p=0.3).modules() if isinstance(m, KernelNorm2d)] == [0.5]
    for make in (fcn_knresnet34, fcn_resnet18):
        assert [m.p for m in make().modules() if isinstance(m, nn.Dropout)] == [0.1]


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_keeps_less_for_backward_than_batch_normalization_allows(depth):
    """The aim is 1.35 times the bytes of an FCN on ResNet; they grow in proportion to batch and image."""
    x = torch.rand(1, 3, 64, 128).to(memory_format=torch.channels_last)
    kept = [bytes_kept(getattr(models, f"fcn_{name}resnet{depth}")(), x) for name in ("kn", "")]
    assert kept[0] < 1.35 * kept[1]
