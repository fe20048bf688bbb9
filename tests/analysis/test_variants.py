import pytest
import torch
import torch.nn.functional as F
from torch import nn

from knlightning.analysis.variants import (
    RESNETS,
    AlgorithmOneConv2d,
    Case,
    PrimitiveBatchNorm2d,
    build,
    count_flops,
)
from knlightning.nn import KernelNorm2d, KNConv2d, kn_conv

NORM_OF = {"batch": nn.BatchNorm2d, "batch-primitives": PrimitiveBatchNorm2d, "group": nn.GroupNorm}


@pytest.mark.parametrize("geometry", [(3, 2, 1), (2, 1, (1, 0, 1, 0)), (1, 1, 0)])
def test_algorithm_one_is_knconv_with_the_same_mask(monkeypatch, geometry):
    kernel_size, stride, padding = geometry
    layer = AlgorithmOneConv2d(3, 4, kernel_size, stride, padding, dropout_p=0.25).double()
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    mask = torch.rand_like(x) > 0.25
    pads = padding if isinstance(padding, tuple) else (padding,) * 4
    padded_mask = F.pad(mask.double(), pads)
    monkeypatch.setattr(F, "dropout", lambda values, p: values * padded_mask / (1 - p))
    ours = kn_conv(x, layer.weight, layer.bias, stride, padding, dropout_p=0.25, mask=mask)
    torch.testing.assert_close(layer(x), ours, rtol=1e-12, atol=1e-12)


def test_dropout_of_algorithm_one_is_on_in_evaluation():
    layer = AlgorithmOneConv2d(3, 4, 3, dropout_p=0.5).eval()
    x = torch.rand(1, 3, 5, 5)
    assert not torch.equal(layer(x), layer(x))


def test_primitives_are_batch_normalization():
    native, primitive = nn.BatchNorm2d(3).double(), PrimitiveBatchNorm2d(3).double()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(primitive(x), native(x))
    primitive.load_state_dict(native.state_dict())
    torch.testing.assert_close(primitive.eval()(x), native.eval()(x))


@pytest.mark.parametrize("network", RESNETS)
@pytest.mark.parametrize("variant", ["floor", "kernel", "algorithm1"])
def test_kernel_variants_share_architecture_and_parameters(network, variant):
    with torch.device("meta"):
        net = build(Case(network, variant, 32, 1))
        reference = build(Case(network, "kernel", 32, 1))
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in reference.parameters())
    expected = {"floor": None, "kernel": KNConv2d, "algorithm1": AlgorithmOneConv2d}[variant]
    assert {type(m) for m in net.modules() if isinstance(m, KNConv2d)} == ({expected} if expected else set())
    norms = {m.eval_statistics for m in net.modules() if isinstance(m, KernelNorm2d)}
    assert norms == {"floor": set(), "kernel": {"expected"}, "algorithm1": {"sampled"}}[variant]


@pytest.mark.parametrize(
    ("variant", "norms"), [("floor", set()), ("kernel", set()), ("batch", {nn.BatchNorm2d}), ("group", {nn.GroupNorm})]
)
def test_networks_of_torchvision_are_converted(variant, norms):
    with torch.device("meta"):
        net = build(Case("torchvision_mobilenet_v2", variant, 32, 1))
    types = [type(module) for module in net.modules()]
    assert {t for t in types if t in (nn.BatchNorm2d, nn.GroupNorm)} == norms
    assert types.count(KNConv2d) == (52 if variant == "kernel" else 0)


@pytest.mark.parametrize("variant", NORM_OF)
def test_other_variants_are_resnets_with_their_norm(variant):
    with torch.device("meta"):
        net = build(Case("resnet18", variant, 32, 1))
        layers = build(Case("layers", variant, 32, 1))
    assert {type(m) for m in net.modules() if "Norm" in type(m).__name__} == {NORM_OF[variant]}
    assert sum(isinstance(m, NORM_OF[variant]) for m in layers.modules()) == 4


@pytest.mark.parametrize("network", ["resnet18", "resnet34", "resnet50", "layers"])
@pytest.mark.parametrize("resolution", [16, 64, 96])  # the stem is another one from 96 on
@pytest.mark.parametrize("variant", ["floor", "batch"])
def test_networks_take_images_of_any_size(network, resolution, variant):
    with torch.device("meta"):
        case = Case(network, variant, resolution, 1, stride=3)
        assert build(case)(torch.zeros(2, 3, resolution, resolution)).shape[1] >= 100


def test_flops_by_hand():
    images = torch.rand(2, 4, 10, 10)
    convolution = 2 * (2 * 8 * 100) * (4 * 9)  # two for each of 36 products of 1600 outputs
    linear = 2 * 2 * 8 * 5
    plain = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    assert count_flops(plain, images) == convolution + linear
    assert count_flops(KNConv2d(4, 8, 3, padding=1), images) == convolution + 3 * 800 + 3 * 1600
    assert count_flops(AlgorithmOneConv2d(4, 8, 3, padding=1), images) == convolution + 3 * 200 * 36 + 3 * 1600
    pixels = KNConv2d(4, 8, 1).to(memory_format=torch.channels_last)  # by a product of matrices
    last = images.to(memory_format=torch.channels_last)
    assert count_flops(pixels, last) == convolution / 9 + 3 * 800 + 3 * 1600
    for norm in (nn.BatchNorm2d(4), PrimitiveBatchNorm2d(4), nn.GroupNorm(2, 4)):
        assert count_flops(nn.Sequential(norm), images) == 7 * 800


@pytest.mark.parametrize(
    ("variant", "kind"), [("kernel", KNConv2d), ("batch", nn.BatchNorm2d), ("group", nn.GroupNorm)]
)
@pytest.mark.parametrize("network", ["fcn_resnet18", "fcn_resnet34", "fcn_resnet50"])
def test_networks_for_segmentation(network, variant, kind):
    case = Case(network, variant, 32, 3)
    with torch.device("meta"):
        net = build(case)
    net.to_empty(device="cpu")  # the shape alone counts
    with torch.no_grad():
        assert net(torch.rand(case.evaluation_shape)).shape == (1, 19, 64, 128)
    assert case.shape == (3, 3, 32, 64)
    assert case.setting == f"{network}, 64x32, batch 3"
    assert any(isinstance(m, kind) for m in net.modules())


def test_floor_of_segmentation_has_neither_norm_nor_kernel_normalization():
    with torch.device("meta"):
        net = build(Case("fcn_resnet50", "floor", 32, 1))
    assert sum(p.numel() for p in net.parameters()) == 32_873_971
    assert not any("Norm" in type(m).__name__ or isinstance(m, KNConv2d) for m in net.modules())
