from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from privacy.micro_batches import check
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer
from torchvision.models.convnext import CNBlock, LayerNorm2d

from knlightning import models
from knlightning.nn import KNConv1d, KNConv2d, KNConv3d, LocalContextNorm2d, PositionalNorm2d
from knlightning.privacy import PerSampleGradients, product, rules


class Around(nn.Module):
    """A kernel normalized convolution with what is fused into it."""

    def __init__(self, conv, relu_input, after):
        super().__init__()
        self.before = nn.Linear(conv.inner[-1], conv.inner[-1])  # so that a gradient goes through the layer
        self.conv, self.relu_input, self.after = conv, relu_input, after

    def forward(self, x):
        x = self.before(x)
        kwargs = {"relu_input": self.relu_input, "relu_output": self.after == "relu"}
        if self.after == "residual":
            with torch.no_grad():
                kwargs["residual"] = torch.zeros_like(self.conv(x, **kwargs)) + 0.5
        return self.conv(x, keep_output=self.after == "keep", **kwargs)


@st.composite
def layers(draw):
    spatial = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 2))
    channels, filters = (groups * draw(st.integers(1, 3)) for _ in range(2))
    kernel = draw(st.tuples(*[st.integers(1, 3)] * spatial))
    stride = draw(st.tuples(*[st.integers(1, 2)] * spatial))
    dilation = draw(st.integers(1, 2))
    size = [dilation * (k - 1) + 1 + draw(st.integers(0, 3)) for k in kernel]
    padding = draw(st.sampled_from([0, 1, 2, "same", "valid"]))
    padding_mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    kind = draw(st.sampled_from(["kn", "kn", "conv"]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    batch = draw(st.integers(0, 3))
    x = torch.randn(batch, channels, *size, dtype=torch.float64)
    if spatial == 2 and draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    bias = draw(st.booleans())
    if padding == "same":
        stride = 1
    if kind == "kn" and spatial == 2 and draw(st.booleans()):
        padding, stride = draw(st.tuples(*[st.integers(0, 2)] * 4)), 2
    if padding_mode in ("reflect", "circular") and min(size) <= 2:  # it would be too small for some of these paddings
        padding_mode = "replicate"
    if kind == "conv":
        cls = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[spatial]
        return cls(channels, filters, kernel, stride, padding, dilation, groups, bias, padding_mode).double(), x
    cls = {1: KNConv1d, 2: KNConv2d, 3: KNConv3d}[spatial]
    p = draw(st.sampled_from([0.0, 0.2]))
    conv = cls(
        *(channels, filters, kernel, stride, padding, groups, bias, p, 1e-2),
        dilation=dilation,
        padding_mode=padding_mode,
    ).double()
    conv.inner = size
    if bias:  # windows of one element are 0 but for rounding, and a ReLU would ask for its sign
        nn.init.normal_(conv.bias)
    return Around(
        conv, draw(st.booleans()), draw(st.sampled_from(["", "keep"] if p else ["", "keep", "relu", "residual"]))
    ).double(), x


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@settings(deadline=None, max_examples=150)
@given(
    case=layers(),
    reduction=st.sampled_from(["mean", "sum"]),
    ghost=st.sampled_from([None, False, True]),
    small=st.sampled_from([None, False]),
    temporary=st.sampled_from([1, 2**20]),
    views=st.sampled_from([1, 2]),
)
def test_layers_of_any_shape_equal_micro_batches(case, reduction, ghost, small, temporary, views):
    """Whichever way is taken to a norm, and in however small parts."""
    net, x = case
    with mock.patch.dict(product.TEMPORARY_BYTES, cpu=temporary), pytest.MonkeyPatch.context() as patch:
        for name, choice in (("_ghost", ghost), ("small", small)):
            if choice is not None:
                patch.setattr(product.Product, name, lambda self, choice=choice: choice)
        check(net, x, reduction, views=1 if len(x) % views else views)


NORMS = [
    (nn.GroupNorm(2, 4), (4, 3, 5)),
    (nn.LayerNorm(5), (4, 3, 5)),
    (nn.LayerNorm([3, 5]), (4, 3, 5)),
    (nn.LayerNorm(4), (4,)),
    (nn.LayerNorm(4, bias=False), (3, 4)),
    (nn.InstanceNorm2d(4, affine=True), (4, 3, 5)),
    (nn.InstanceNorm1d(4, affine=True), (4, 3)),
    (LocalContextNorm2d(4, window=3), (4, 3, 5)),
    (PositionalNorm2d(4), (4, 3, 5)),
    (LayerNorm2d(4), (4, 3, 5)),
    (nn.Linear(4, 3), (4,)),
    (nn.Linear(4, 3), (2, 4)),
    (nn.Linear(4, 3, bias=False), (2, 3, 4)),
]


@pytest.mark.parametrize("temporary", [1, 2**20])
@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.parametrize(("layer", "shape"), NORMS, ids=lambda v: str(v) if isinstance(v, tuple) else type(v).__name__)
def test_norms_and_linear_layers(layer, shape, batch, temporary):
    torch.manual_seed(0)
    batch = batch or int(isinstance(layer, rules.InstanceNorm))  # for which torch takes no empty batches
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    with mock.patch.dict(product.TEMPORARY_BYTES, cpu=temporary):
        check(layer.double(), torch.randn(batch, *shape, dtype=torch.float64))


def small(name, **kwargs):
    torch.manual_seed(0)
    net = getattr(models, name)(
        num_classes=3, **({} if "convnext" in name else {"low_resolution": True}), **kwargs
    ).double()
    for module in net.modules():
        if isinstance(module, CNBlock):
            nn.init.normal_(module.layer_scale)
            module.stochastic_depth.p = 0.0  # not one of the masks that can be repeated
    return net


QUICK = [
    *(("resnet8", {"norm": norm}) for norm in ("layer", "none", "kernel")),  # the other norms are layers above
    *(("knresnet8", {"activation": activation}) for activation in ("relu", "mish")),
]
SLOW = [
    *(("knresnet18", {"activation": activation}) for activation in ("relu", "mish")),
    *((name, {}) for name in ("knresnet13", "knresnet34", "knresnet50", "convnext_tiny", "knconvnext_tiny")),
    *((name, {"norm": "kernel"}) for name in ("resnet18", "resnet50", "preact_resnet18", "preact_resnet50")),
    *((name, {"norm": norm}) for name in ("densenet121", "vgg11") for norm in ("group", "kernel")),
    *((name, {"norm": "group"}) for name in ("resnet18", "resnet50", "preact_resnet18")),
]


@pytest.mark.parametrize(("name", "kwargs"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_networks_equal_micro_batches(name, kwargs):
    x = torch.rand(2, 3, *((17, 18) if name.endswith("net8") else (33, 34)), dtype=torch.float64)
    check(small(name, **kwargs), x, rtol=1e-7)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.unused = KNConv2d(3, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.Linear(2, 2)
        self.tied = nn.Conv2d(3, 3, 3, padding=1)
        self.tied.weight = self.conv.weight
        self.frozen = nn.Conv2d(3, 3, 1).requires_grad_(False)

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.tied(self.frozen(self.norm(self.conv(x).tanh())))


@pytest.mark.parametrize("small", [False, True])
def test_layers_used_twice_ties_and_parameters_that_take_no_part(small, monkeypatch):
    """The contributions are added before the norm, even of weights whose gradients of samples are not kept else."""
    monkeypatch.setattr(product.Product, "small", lambda self: small)
    torch.manual_seed(0)
    net = Twice().double()
    check(net, torch.randn(3, 3, 5, 6, dtype=torch.float64))


def run(net, x):
    gradients = PerSampleGradients(net, "sum")
    gradients.attach()
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.float32):
        loss = net(x).float().square().sum()
    loss.backward()
    return gradients


NETWORKS = [partial(models.knresnet8, activation="mish"), partial(VisionTransformer, 16, 8, 1, 2, 8, 16)]


@pytest.mark.parametrize("make", NETWORKS, ids=["KNResNet", "ViT"])
def test_norms_hold_under_autocast(make):
    """The sum of one sample alone has the norm that was computed, to the precision of float32."""
    torch.manual_seed(0)
    net = make(num_classes=3)
    x = torch.rand(3, 3, 16, 16)
    for sample in range(3):
        torch.manual_seed(0)
        gradients = run(net, x)
        norms = gradients.norms()
        assert norms.dtype == torch.float32
        gradients.accumulate(F.one_hot(torch.tensor(sample), 3).float())
        total = torch.stack([p.summed_grad.norm() for p in net.parameters()]).norm()
        torch.testing.assert_close(total, norms[sample], rtol=1e-5, atol=0)
        gradients.detach()
        for parameter in net.parameters():
            parameter.summed_grad = None


def test_samples_that_are_not_finite_take_no_part():
    torch.manual_seed(0)
    net = models.knresnet8(num_classes=3, dropout_p=0.0, activation="mish").double()
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    spoilt = x.clone()
    spoilt[1, 0, 0, 0] = torch.nan
    found = []
    for images in (x[[0, 2]], spoilt):
        gradients = run(net, images)
        norms = gradients.norms()
        assert norms.isfinite().tolist() == ([True, True] if len(images) == 2 else [True, False, True])
        gradients.accumulate(torch.ones(len(images)))
        found.append([p.summed_grad for p in net.parameters()])
        gradients.detach()
        for parameter in net.parameters():
            parameter.summed_grad = None
    torch.testing.assert_close(found[0], found[1])


def test_sums_of_several_batches_add_up_and_detaching_leaves_nothing():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4, 2)).double()
    x = torch.rand(4, 3, 3, 3, dtype=torch.float64)
    gradients = PerSampleGradients(net, "sum")
    gradients.attach()
    with torch.no_grad():
        net(x)  # as in validation
    with pytest.raises(RuntimeError, match="no backward pass was seen"):
        gradients.norms()
    for part in (x[:1], x[1:]):
        net(part).square().sum().backward()
        with pytest.raises(RuntimeError, match=r"call norms\(\) first"):
            gradients.accumulate(torch.ones(len(part)))
        gradients.norms()
        with pytest.raises(ValueError, match=r"weights must have shape \(\d,\), got \(7,\)"):
            gradients.accumulate(torch.ones(7))
        gradients.accumulate(torch.ones(len(part)))
    with pytest.raises(RuntimeError, match="watched already"):
        gradients.attach()
    gradients.detach()
    net(x).square().sum().backward()
    for parameter in net.parameters():
        torch.testing.assert_close(parameter.summed_grad, parameter.grad)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    gradients.attach()


def test_a_failed_forward_pass_leaves_parameters_trainable():
    net = nn.Conv2d(3, 4, 3)
    PerSampleGradients(net).attach()
    with pytest.raises(RuntimeError, match="channels"):
        net(torch.rand(1, 2, 5, 5))
    assert all(p.requires_grad for p in net.parameters())


def test_gradients_from_elsewhere_are_refused():
    net = nn.Linear(3, 2)
    PerSampleGradients(net).attach()
    with pytest.raises(RuntimeError, match="weight got a gradient from outside of its layer, such as a penalty"):
        (net(torch.rand(4, 3)).sum() + net.weight.square().sum()).backward()
    assert net.weight.grad is None


def test_changes_in_place_and_a_second_backward_pass_are_refused():
    net = nn.Sequential(nn.Tanh(), nn.Linear(3, 2))
    PerSampleGradients(net).attach()
    x = net[0](torch.rand(4, 3))
    y = net[1](x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match=r"1 \(Linear\): its input was changed in place"):
        y.sum().backward()
    y = net(torch.rand(4, 3))
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"1 \(Linear\): a second backward pass"):
        y.sum().backward()


def test_samples_must_come_first():
    net = nn.Sequential(nn.Linear(3, 2), nn.Flatten(0), nn.Linear(8, 1))
    PerSampleGradients(net).attach()
    with pytest.raises(RuntimeError, match=r"0 \(Linear\) was given 4 samples, and other layers 8"):
        net[2](net[0](torch.rand(4, 3)).flatten().expand(8, 8)).sum().backward()


def test_inputs_must_come_by_position():
    net = nn.Linear(3, 2)
    PerSampleGradients(net).attach()
    with pytest.raises(TypeError, match="Linear must be called with its input as the first positional argument"):
        net(input=torch.rand(4, 3))
    assert net.weight.requires_grad


def test_unknown_layers_are_named():
    with pytest.raises(ValueError, match=r"cannot be computed:\n1 \(BatchNorm2d\): there is no rule .*Freeze"):
        PerSampleGradients(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with pytest.raises(ValueError, match="loss_reduction must be one of mean, sum, got 'none'"):
        PerSampleGradients(nn.Linear(1, 1), "none")


def test_a_layer_shared_by_checkpoints_that_run_again_in_backward():
    """Each of them is forward and backward before the next begins: nobody knows that the weight comes again."""
    torch.manual_seed(0)
    shared, head = nn.Linear(30, 30), nn.Linear(30, 2)

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.head = shared, head

        def forward(self, x):
            for _ in range(3):
                x = checkpoint(self.shared, x, use_reentrant=True).relu()
            return self.head(x)

    net, x = Shared(), torch.randn(4, 30, requires_grad=True)
    exact = []
    for row in x.detach():
        loss = head(shared(shared(shared(row[None]).relu()).relu()).relu()).sum()
        exact.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))]))
    gradients = PerSampleGradients(net, "sum")
    gradients.attach()
    net(x).sum().backward()
    torch.testing.assert_close(gradients.norms(), torch.stack(exact).norm(dim=1), rtol=1e-4, atol=0)
    gradients.accumulate(torch.ones(4))
    total = torch.cat([p.summed_grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(total, torch.stack(exact).sum(0), rtol=1e-3, atol=1e-4)
    gradients.detach()
