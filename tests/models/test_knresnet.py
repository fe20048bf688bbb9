import published
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.traffic import count_bytes
from knlightning import models
from knlightning.analysis.measure import bytes_kept
from knlightning.models import KNResNet, fcn_knresnet8, knresnet8, knresnet13, knresnet18, knresnet34, knresnet50
from knlightning.models.layers import Layers, Options, Stage
from knlightning.models.norm_torch import norm_torch_names
from knlightning.nn import KNConv2d, fused_kernels, kernel_norm, kn_conv

MODELS = {
    "knresnet18": knresnet18,
    "knresnet34": knresnet34,
    "knresnet50": knresnet50,
}


@pytest.mark.parametrize("depth", [50, 101, 152])
def test_deeper_networks_follow_the_rule_of_knresnet50(depth):
    with torch.device("meta"):
        model, plain = getattr(models, f"knresnet{depth}")(), getattr(models, f"resnet{depth}")()
    weights = [p for p in model.parameters() if p.dim() > 1]
    assert len(weights) == depth
    parameters, allowed = (sum(p.numel() for p in net.parameters()) for net in (model, plain))
    assert 0.99 * allowed < parameters <= allowed
    block = model.stages[2][0].conv1
    assert block.in_channels == pytest.approx(4 * block.out_channels, abs=6)


@pytest.mark.parametrize("case", published.VALUES["models"])
def test_outputs_and_gradients_equal_the_published_networks(case):
    reference = published.VALUES["models"][case]
    model = MODELS[case.split("-")[0]](
        num_classes=reference["num_classes"], low_resolution=True, dropout_p=0.0
    ).double()
    shapes = {name: p.shape for name, p in model.state_dict().items()}
    model.load_state_dict(
        {ours: published.weights(theirs, shapes[ours]) for theirs, ours in norm_torch_names(model).items()}
    )
    x = published.images(reference["input"]).requires_grad_()
    logits = model(x)
    logits.square().sum().backward()
    torch.testing.assert_close(
        logits[:, :10], torch.tensor(reference["logits"], dtype=torch.float64), rtol=1e-8, atol=1e-9
    )
    assert logits.abs().sum().item() == pytest.approx(reference["logits_abs_sum"], rel=1e-8)
    assert x.grad.abs().sum().item() == pytest.approx(reference["input_grad_abs_sum"], rel=1e-6)


def test_knresnet13_is_the_network_that_its_description_says():
    torch.manual_seed(0)
    model = knresnet13(num_classes=6, dropout_p=0.0).double()
    weights = {name: nn.init.normal_(p, std=0.05) for name, p in model.named_parameters()}
    assert len(weights) == 2 * 13

    def conv(x, name):
        return kn_conv(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1, dropout_p=0.0)

    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    x = conv(images, "stem.0")
    for i in range(4):
        if i > 0:
            x = F.max_pool2d(conv(x.relu(), f"transitions.{i - 1}.1"), 2)
        x = x + conv(conv(x.relu(), f"stages.{i}.0.conv1").relu(), f"stages.{i}.0.conv2")
    assert x.shape == (2, 256, 4, 4)
    x = F.adaptive_avg_pool2d(kernel_norm(x, 1, dropout_p=0.0).relu(), 2).flatten(1)
    torch.testing.assert_close(model(images), F.linear(x, weights["fc.weight"], weights["fc.bias"]))


@pytest.mark.parametrize("size", [(128, 128), (161, 225)])
def test_high_resolution_networks_take_any_size(size):
    with torch.no_grad():
        assert knresnet18(num_classes=5).eval()(torch.randn(1, 3, *size)).shape == (1, 5)


def test_other_norms_replace_every_kernel_normalized_layer():
    for norm in ("batch", "none"):
        model = knresnet8(norm=norm)
        assert not any(hasattr(m, "dropout_p") for m in model.modules())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in knresnet8(norm="batch").modules()) == 9
    kernel, none = (sum(p.numel() for p in knresnet8(norm=n).parameters()) for n in ("kernel", "none"))
    assert kernel == none


class SeparateKNConv2d(KNConv2d):
    """A convolution that leaves the activations beside it and the sum to other layers."""


def bottlenecks():
    return KNResNet((Stage(8, 1, 6), Stage(12, 1, 6)), Layers(Options(num_classes=5)), bottleneck=True)


@pytest.mark.parametrize("make", [knresnet8, fcn_knresnet8, bottlenecks])
def test_fused_blocks_compute_what_the_separate_layers_do(make):
    model = make().double()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    called, results = [], []
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda *_: called.append(1))
    for separate in (False, True):
        for module in model.modules():
            if separate and isinstance(module, KNConv2d):
                module.__class__ = SeparateKNConv2d
        called.clear()
        torch.manual_seed(0)
        out = model(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), tuple(model.parameters()))])
        assert (len(called) > 2) == separate
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_kernel_normalized_network_keeps_hardly_more_for_backward_than_plain_convolutions():
    """The aim is 1.1 times the same network without normalization; 5 % of it are the positions of dropped elements."""
    x = torch.rand(2, 3, 32, 32).to(memory_format=torch.channels_last)
    kept = [bytes_kept(knresnet18(num_classes=100, low_resolution=True, norm=norm), x) for norm in ("kernel", "none")]
    assert kept[0] < 1.1 * kept[1]


@pytest.mark.parametrize("fused", [True, False])
def test_no_step_waits_for_the_device(fused):
    """On the meta device nothing has a value: whatever reads one, as `item`, `bool` or `nonzero` do, is an error."""
    net = knresnet18(num_classes=10, low_resolution=True).to("meta")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    images, labels = torch.empty(2, 3, 32, 32, device="meta"), torch.empty(2, dtype=torch.long, device="meta")
    with fused_kernels(fused):
        count_bytes(lambda: F.cross_entropy(net(images), labels))
    optimizer.step()
    with pytest.raises(RuntimeError):
        net(images).sum().item()
    with pytest.raises(NotImplementedError):
        images.nonzero()
