import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from nn import naive
from torch import nn

from knlightning.analysis.measure import bytes_kept
from knlightning.models import is_batch_independent, kernel_normalize, knresnet8
from knlightning.models.kernel_normalize import Report
from knlightning.nn import GroupKNConv2d, KNConv1d, KNConv2d, KNConv3d, KNConvTranspose2d, kn_conv, make_norm
from knlightning.nn.activations import OtherReLU

KN_CONVS = KNConv1d | KNConv2d | KNConv3d
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
# pairs, and the normalizations that are in none
TORCHVISION = {
    "resnet18": (20, []),
    "densenet121": (120, []),
    "regnet_y_400mf": (53, []),
    "efficientnet_b0": (49, []),
    "mobilenet_v2": (52, []),
    "convnext_tiny": (22, ["classifier.0"]),
}


def conv_bn(in_channels, out_channels, **geometry):
    conv = nn.Conv2d(in_channels, out_channels, 3, bias=False, **geometry)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def hooked(layer):
    layer.register_forward_hook(lambda *_: None)
    return layer


class Network(nn.Module):
    """Layers by name, and a function that calls them."""

    def __init__(self, call, **layers):
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.call(self, x)


def reason(report, name):
    assert name in report.left, report
    return report.left[name]


@pytest.mark.parametrize("name", TORCHVISION)
def test_networks_of_torchvision(name):
    pairs, unpaired = TORCHVISION[name]
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=5)
    before = copy.deepcopy(model)
    network, report = kernel_normalize(model)

    assert str(model) == str(before)
    for (key, tensor), (_, old) in zip(model.state_dict().items(), before.state_dict().items(), strict=True):
        assert torch.equal(tensor, old), key

    assert (len(report.convolutions), len(report.norms)) == (pairs, pairs)
    assert [n for n in report.left if isinstance(model.get_submodule(n), NORMS)] == unpaired
    assert not [n for n, m in network.named_modules() if isinstance(m, NORMS) and n not in unpaired]
    named = [*report.convolutions, *report.norms, *report.replaced, *report.left]
    assert sorted(named) == sorted(n for n, m in model.named_modules() if isinstance(m, CONVS + NORMS))
    assert list(report.replaced) == (["features.norm5"] if name == "densenet121" else [])
    assert is_batch_independent(network)
    assert all(isinstance(network.get_submodule(n), KNConv2d) for n in report.convolutions)
    assert all(isinstance(network.get_submodule(n), nn.Identity) for n in report.norms)
    assert all(type(network.get_submodule(n)) is type(model.get_submodule(n)) for n in report.left)

    state, old_state = network.state_dict(), model.state_dict()
    of_norms = {k for k in old_state if k.rpartition(".")[0] in {*report.norms, *report.replaced}}
    assert state.keys() == (old_state.keys() - of_norms) | {f"{n}.bias" for n in report.convolutions}
    assert all(torch.equal(state[k], old_state[k]) for k in old_state.keys() - of_norms)

    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    logits = network(images)
    assert not torch.autograd.grad(logits[0].square().sum(), images, retain_graph=True)[0][1].any()
    logits.logsumexp(1).sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key

    network = network.double().eval()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        together = network(x)
        assert torch.equal(together, network(x))
        torch.testing.assert_close(together[1:2], network(x[1:2]), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")  # torch's
@pytest.mark.parametrize(
    ("conv", "pads"),
    [
        (nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), groups=2), (0, 0, 1, 1)),
        (nn.Conv2d(4, 6, (2, 4), padding="same", bias=False), (1, 2, 0, 1)),
        (nn.Conv2d(4, 4, 3, padding="same", groups=4), (1, 1, 1, 1)),
        (nn.Conv2d(4, 6, 2, padding="valid"), (0, 0, 0, 0)),
        (nn.Conv2d(4, 6, 1, dilation=2, padding_mode="reflect"), (0, 0, 0, 0)),
        (nn.Conv1d(4, 6, 5, padding="same", bias=False), (2, 2)),
        (nn.Conv3d(4, 6, 2, 2, (1, 0, 1)), (1, 1, 0, 0, 1, 1)),
    ],
)
def test_a_pair_becomes_the_kernel_normalized_convolution_by_its_definition(conv, pads):
    spatial = len(conv.kernel_size)
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[spatial - 1](conv.out_channels)
    model = nn.Sequential(conv, norm, nn.ReLU(inplace=True)).double().eval()
    network, _ = kernel_normalize(model, dropout_p=0.0)
    x = torch.randn(2, 4, *range(5, 5 + spatial), dtype=torch.float64)
    plain = conv(x)
    expected = naive.kn_conv(x, conv.weight, conv.bias, conv.stride, pads, conv.groups).relu()
    torch.testing.assert_close(network(x), expected)
    padded = F.pad(x, pads)
    conv.padding = (0,) * spatial
    assert torch.equal(plain, conv(padded))  # the padding is torch's


@pytest.mark.parametrize(
    "norm",
    [
        nn.SyncBatchNorm(8),
        nn.GroupNorm(2, 8),
        nn.InstanceNorm2d(8),
        nn.LayerNorm([8, 4, 4]),
        torchvision.models.convnext.LayerNorm2d(8),
        *(make_norm(name, 8) for name in ("positional", "local_context")),
    ],
)
def test_kinds_of_normalization(norm):
    network, report = kernel_normalize(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm, nn.ReLU()))
    assert report == Report(["0"], ["1"])
    assert isinstance(network[1], nn.Identity)


def test_layer_normalization_of_permuted_images():
    def network(*dims):
        norm = nn.LayerNorm(4)
        return nn.Sequential(nn.Conv2d(3, 4, 1), torchvision.ops.Permute(list(dims)), norm, nn.Linear(4, 4))

    assert kernel_normalize(network(0, 2, 3, 1))[1] == Report(["0"], ["2"])
    with pytest.raises(ValueError, match="2  left: its input comes from permute"):
        kernel_normalize(network(0, 3, 2, 1))
    model = Network(lambda self, x: self.norm(self.conv(x).permute(0, 2, 3, 1)), conv=nn.Conv2d(3, 4, 1))
    model.norm = nn.LayerNorm(4)
    assert kernel_normalize(model)[1] == Report(["conv"], ["norm"])
    with pytest.raises(ValueError, match="1  left: it does not normalize the channels"):
        kernel_normalize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm(4)))
    with pytest.raises(ValueError, match="0  left: its input comes from the input; it normalizes the last dimension"):
        kernel_normalize(nn.Sequential(nn.LayerNorm(4), nn.Conv2d(3, 4, 1)))


class PreActivated(nn.Module):
    """A block as in preact ResNets, with an activation in place that all convolutions share."""

    def __init__(self, function=False):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.shortcut = nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU(inplace=True)
        self.function = function

    def forward(self, x):
        out = F.relu(self.bn1(x), inplace=True) if self.function else self.relu(self.bn1(x))
        branch = self.conv2(self.relu(self.bn2(self.conv1(out))))
        return x + branch + self.shortcut(out)


def test_a_pre_activated_block_leaves_its_shortcut_unchanged():
    model = PreActivated().double().eval()
    network, report = kernel_normalize(model, dropout_p=0.0)
    assert report == Report(["conv1", "conv2", "shortcut"], ["bn1", "bn2"])
    assert model.relu.inplace

    def kn_conv(conv, x):
        return naive.kn_conv(x, conv.weight, conv.bias, (1, 1), conv.padding * 2)

    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    out = x.relu()
    expected = x + kn_conv(model.conv2, kn_conv(model.conv1, out).relu()) + kn_conv(model.shortcut, out)
    given = x.clone()
    torch.testing.assert_close(network(given), expected)
    assert torch.equal(given, x)
    network.train()(x).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_a_function_in_place_keeps_the_normalization_before_it():
    _, report = kernel_normalize(PreActivated(function=True), rest="keep")
    assert "bn1" not in report.norms
    assert reason(report, "bn1") == (
        "its input comes from the input; its result is changed in place by the function relu"
    )


class BatchNormAct2d(nn.BatchNorm2d):
    """As in timm: normalization, dropout and activation in one layer, which is a normalization to its class."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop = nn.Dropout2d(0.5)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize("norm_first", [True, False])
def test_normalizations_with_an_activation_leave_it_behind(norm_first):
    layers = [BatchNormAct2d(4), nn.Conv2d(4, 4, 3)]
    model = nn.Sequential(*(layers if norm_first else layers[::-1])).eval()
    network, report = kernel_normalize(model)
    at = 0 if norm_first else 1
    assert report == Report([str(1 - at)], [str(at)])
    assert list(network[at].named_children()) == [("drop", network[at].drop), ("act", network[at].act)]
    assert network[at].act.inplace is not norm_first
    assert not network[at].training
    x = torch.randn(2, 4, 5, 5)
    given = x.clone()
    y = network(given)
    assert torch.equal(given, x)
    assert norm_first or (y >= 0).all()


def test_a_block_called_twice():
    model = Network(lambda self, x: self.block(self.block(x)), block=conv_bn(3, 3, padding=1))
    model.other, model.first = model.block, model.block[0]
    network, report = kernel_normalize(model)
    assert report == Report(["block.0"], ["block.1"])
    assert network.other is network.block
    assert network.first is network.block[0]
    network(torch.randn(2, 3, 5, 5)).sum().backward()


def test_a_convolution_called_twice_needs_a_normalization_each_time():
    layers = {"conv": nn.Conv2d(3, 3, 1), "a": nn.BatchNorm2d(3), "b": nn.BatchNorm2d(3)}
    model = Network(lambda self, x: self.a(self.conv(x)) + self.b(self.conv(2 * x)), **layers)
    assert kernel_normalize(model, rest="keep")[1] == Report(["conv"], ["a", "b"])
    model.call = lambda self, x: self.a(self.conv(x)) + self.conv(2 * x)
    with pytest.raises(ValueError, match="a     left: the result of conv goes to add; its result goes to add\n"):
        kernel_normalize(model, rest="keep")
    model.call = lambda self, x: self.conv(F.relu(self.a(x))) + self.conv(self.b(2 * x))
    assert kernel_normalize(model, rest="keep")[1] == Report(["conv"], ["a", "b"])
    model.call = lambda self, x: self.conv(self.a(x)) + self.conv(2 * x)
    with pytest.raises(ValueError, match="its result goes to conv, and so does that of mul\n"):
        kernel_normalize(model, rest="keep")


def test_a_result_that_goes_elsewhere_too():
    layers = {"stem": conv_bn(3, 3), "conv": nn.Conv2d(3, 3, 3, padding=1), "norm": nn.BatchNorm2d(3)}

    def conv_elsewhere(self, x):
        out = self.conv(self.stem(x))
        return self.norm(out) + out

    _, report = kernel_normalize(Network(conv_elsewhere, **layers), rest="keep")
    assert report.convolutions == ["stem.0"]
    assert reason(report, "norm") == "the result of conv goes to norm and add; its result goes to add"
    assert reason(report, "conv") == "no normalization forms a pair with it: its result goes to norm and add"

    def norm_elsewhere(self, x):
        out = self.norm(F.max_pool2d(self.stem(x), 2))
        return self.conv(out) + out

    _, report = kernel_normalize(Network(norm_elsewhere, **layers), rest="keep")
    assert report.convolutions == ["stem.0"]
    assert reason(report, "norm") == "its input comes from max_pool2d; its result goes to add"


def test_each_convolution_makes_do_with_one_normalization():
    """A classifier behind a pair stays plain; a pair that is normalized on both sides loses both normalizations."""
    model = nn.Sequential(*conv_bn(3, 4), nn.Dropout(), nn.Conv2d(4, 2, 1))
    assert kernel_normalize(model)[1] == Report(
        ["0"], ["1"], {"4": "no normalization forms a pair with it: its result goes to the output"}
    )
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert kernel_normalize(model)[1] == Report(["2"], ["0", "3"])


class OtherConv(nn.Conv2d):
    def forward(self, input):
        return super().forward(input * 2)


@pytest.mark.parametrize(
    ("conv", "why"),
    [
        (hooked(nn.ConvTranspose2d(4, 4, 2)), "it has hooks or parametrizations, which would be lost"),
        (OtherConv(4, 4, 3), "OtherConv computes something else than Conv2d"),
    ],
)
def test_convolutions_that_cannot_be_replaced(conv, why):
    norm = nn.BatchNorm2d(4)
    with pytest.raises(ValueError, match=f"0  left: {why}.*\n1  left: its input comes from 0: {why}"):
        kernel_normalize(nn.Sequential(conv, norm), rest="keep")
    with pytest.raises(ValueError, match=f"0  left: its input comes from the input; its result goes to 1: {why}"):
        kernel_normalize(nn.Sequential(norm, conv), rest="keep")


def test_normalizations_that_cannot_be_removed():
    norm = hooked(nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="1  left: it has hooks or parametrizations, which would be lost"):
        kernel_normalize(nn.Sequential(nn.Conv2d(4, 4, 3), norm), rest="keep")


def test_nothing_to_replace():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"nothing in this Sequential can be .*:\n.*\n0  left: no normalization forms"):
        kernel_normalize(model, rest="keep")
    with pytest.raises(ValueError, match="nothing in this KNResNet"):
        kernel_normalize(knresnet8(), rest="keep")


def test_a_network_that_cannot_be_traced_is_searched_block_by_block():
    def call(self, x):
        x = self.norm(self.conv(x))
        for block in self.blocks:
            x = block(x) if x.sum() != 0 else x
        return x

    blocks = nn.ModuleList([conv_bn(4, 4), nn.Conv2d(4, 4, 1)])
    model = Network(call, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), blocks=blocks)
    counted = [int(m.num_batches_tracked) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    network, report = kernel_normalize(model, rest="keep")
    assert (report.convolutions, report.norms) == (["blocks.0.0"], ["blocks.0.1"])
    assert list(report.left) == ["conv", "norm", "blocks.1"]
    for why in report.left.values():
        assert why == (
            "Network cannot be traced (TraceError: symbolically traced variables cannot be used as inputs to control "
            "flow)"
        )
    assert counted == [int(m.num_batches_tracked) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    network(torch.randn(2, 3, 7, 7)).sum().backward()
    assert network.norm.num_batches_tracked == 1


class Branches(nn.Module):
    """Takes optional arguments; has a head for training and one for evaluation; one layer rests."""

    def __init__(self):
        super().__init__()
        self.stem, self.auxiliary, self.final, self.resting = (conv_bn(3, 3) for _ in range(4))
        self.register_buffer("shift", torch.zeros(1))

    def forward(self, x, mask=None, deep=False, *, scale=1.0):
        x = self.stem(x - torch.ones(1))
        if mask is not None:
            x = x * mask
        if deep:
            x = self.resting(x)
        return self.auxiliary(x) if self.training else self.final(x) * scale


def test_optional_arguments_and_both_modes():
    model = Branches()
    network, report = kernel_normalize(model, rest="keep")
    assert report.convolutions == ["stem.0", "auxiliary.0", "final.0"]
    assert report.left == dict.fromkeys(["resting.0", "resting.1"], "it is not called")
    assert vars(network).keys() == vars(model).keys()
    assert network.training
    assert network.eval()(torch.randn(1, 3, 9, 9), torch.ones(1), scale=2.0).shape == (1, 3, 5, 5)


def test_a_pair_in_one_mode_alone_is_none():
    def call(self, x):
        out = self.conv(x)
        return self.norm(out) if self.training else self.norm(out) + out

    layers = {"stem": conv_bn(3, 3), "conv": nn.Conv2d(3, 3, 1), "norm": nn.BatchNorm2d(3)}
    _, report = kernel_normalize(Network(lambda self, x: call(self, self.stem(x)), **layers), rest="keep")
    assert reason(report, "norm") == "the result of conv goes to norm and add; its result goes to the output"


class Residual(nn.Module):
    """A block as in ResNets, whose ReLU in place is called behind a convolution, and behind a sum."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


def test_a_relu_behind_a_layer_becomes_a_part_of_it():
    """Outputs and gradients are those of the layers with ReLUs behind them, which keep as much."""
    model = nn.Sequential(*conv_bn(4, 4, padding=1), Residual())
    network, _ = kernel_normalize(model, dropout_p=0.0)
    assert isinstance(network[2], nn.Identity)
    assert isinstance(network[3].relu, OtherReLU)
    assert [m.relu_output for m in network.modules() if isinstance(m, KNConv2d)] == [True, True, False]
    plain, kept = copy.deepcopy(network), []
    plain[0].relu_output = plain[3].conv1.relu_output = False
    plain[2], plain[3].relu = nn.ReLU(), nn.ReLU()
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    for net in (network, plain):
        output = net(x)
        kept.append(bytes_kept(net, x))
        kept.append((output, *torch.autograd.grad(output.square().sum(), (x, *net.parameters()))))
    for ours, expected in zip(kept[1], kept[3], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert kept[2] == kept[0]
    with torch.no_grad():
        assert torch.equal(network(x), kept[1][0])


@pytest.mark.parametrize(
    "call",
    [
        lambda self, x: self.act(self.norm(self.conv(x))) + self.conv(x),
        lambda self, x: self.norm(self.conv(x)) * self.act(x),
        lambda self, x: F.max_pool2d(self.norm(self.conv(x)), 2).relu() + self.act(x)[..., ::2, ::2],
    ],
)
def test_a_relu_that_is_not_alone_behind_a_layer_stays(call):
    layers = {"conv": nn.Conv2d(3, 3, 1), "norm": nn.BatchNorm2d(3), "act": nn.ReLU()}
    stem = conv_bn(3, 3, padding=1)
    network, _ = kernel_normalize(Network(lambda self, x: call(self, self.stem(x)), stem=stem, **layers), rest="keep")
    assert isinstance(network.stem[2], nn.Identity)
    assert type(network.act) is nn.ReLU
    assert not getattr(network.conv, "relu_output", False)


@pytest.mark.parametrize("act", [nn.ReLU6(inplace=True), nn.SiLU(), hooked(nn.ReLU())])
def test_other_activations_stay(act):
    network, _ = kernel_normalize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), act))
    assert type(network[2]) is type(act)
    assert not network[0].relu_output


def test_activations_stay_in_place_where_their_input_is_made_for_them():
    """As behind the concatenations of DenseNet, but not behind what a skip connection reads too."""
    layers = {"norm": nn.BatchNorm2d(6), "act": nn.ReLU(inplace=True), "conv": nn.Conv2d(6, 2, 1)}
    model = Network(lambda self, x: self.conv(self.act(self.norm(torch.cat((x, x), 1)))), **layers)
    assert kernel_normalize(model)[0].act.inplace
    model.call = lambda self, x: self.conv(self.act(self.norm(y := torch.cat((x, x), 1)))) + y[:, :2]
    assert not kernel_normalize(model)[0].act.inplace


def test_parameters_are_those_of_the_convolution():
    model = nn.Sequential(*(conv_bn(4, 4) for _ in range(3))).to(torch.bfloat16, memory_format=torch.channels_last)
    model[1][0].weight = model[0][0].weight
    model[2][0].requires_grad_(False).eval()
    state = torch.random.get_rng_state()
    network, _ = kernel_normalize(model, dropout_p=0.2, eval_statistics="expected")
    assert torch.equal(state, torch.random.get_rng_state())
    convs = [m for m in network.modules() if isinstance(m, KN_CONVS)]
    assert convs[0].weight is convs[1].weight
    assert convs[0].weight is not model[0][0].weight
    assert [p.requires_grad for conv in convs for p in conv.parameters()] == [True] * 4 + [False] * 2
    assert [conv.training for conv in convs] == [True, True, False]
    for conv in convs:
        assert (conv.dropout_p, conv.eval_statistics) == (0.2, "expected")
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert conv.bias.dtype == torch.bfloat16
        assert not conv.bias.any()
    with pytest.raises(ValueError, match="dropout_p"):
        kernel_normalize(model, dropout_p=1.0)


def test_the_report_is_a_table():
    _, report = kernel_normalize(nn.Sequential(*conv_bn(3, 4), nn.Conv2d(4, 2, 1)))
    assert str(report) == (
        "Kernel normalized: 1 convolutions. Normalizations: 1 removed, 0 replaced. Layers left: 1. "
        "Samples of a batch: independent.\n"
        "0  convolution, kernel normalized now\n"
        "1  normalization, removed\n"
        "3  left: no normalization forms a pair with it: its result goes to the output"
    )


def test_the_report_says_what_mixes_samples():
    """Batch normalization that is kept, or has hooks, or another layer with statistics of the batch."""

    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(4, 1, 1))

        def forward(self, x):
            return x - self.running_mean

    layers = [*conv_bn(3, 4), nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.BatchNorm2d(4)]
    network, report = kernel_normalize(nn.Sequential(*layers), rest="keep")
    assert (report.mixing, list(report.left), is_batch_independent(network)) == (["4", "5"], ["4", "5"], False)
    assert report.summary == (
        "Kernel normalized: 1 convolutions. Normalizations: 1 removed, 0 replaced. Layers left: 2. "
        "Samples of a batch: mixed by 4, 5."
    )
    network, report = kernel_normalize(nn.Sequential(*layers, hooked(nn.BatchNorm2d(4)), Centred()))
    assert report.left == {
        "6": "its input comes from 5; its result goes to sub",
        "7": "it keeps statistics of the batch, and is no known normalization",
    } | {"6": "it has hooks or parametrizations, which would be lost"}
    assert (list(report.replaced), report.mixing) == (["4", "5"], ["6", "7"])
    assert not is_batch_independent(network)
    assert is_batch_independent(nn.Sequential(torchvision.ops.FrozenBatchNorm2d(4)))


@pytest.mark.parametrize("rest", ["kernel", "group", "layer"])
def test_what_batch_normalization_without_a_convolution_becomes(rest):
    """By the definition of each, in the order of the network."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), BatchNormAct2d(4), nn.Conv2d(4, 4, 1)).double().eval()
    model.insert(3, nn.MaxPool2d(2))
    with torch.no_grad():
        model[2].weight.copy_(torch.rand(4))
    network, report = kernel_normalize(model, eval_statistics="clean", rest=rest)
    assert list(report.replaced) == ["2"]
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    out = F.max_pool2d(model[0](x), 2)
    if rest == "kernel":
        out = naive.kernel_norm(out, (1, 1), (1, 1), (0, 0, 0, 0))
    else:
        out = F.group_norm(out, 2 if rest == "group" else 1, model[2].weight, model[2].bias)
    torch.testing.assert_close(network(x), model[4](F.max_pool2d(out.relu(), 2)))
    assert [name for name, _ in network[2].named_children()] == ["norm", "drop", "act"]


def test_normalizations_of_what_cannot_be_traced_are_replaced():
    """A linear layer with batch normalization, as in LeViT, in a network that looks at its values."""

    def call(self, x):
        x = self.norm(self.linear(x.mean((2, 3)) if x.sum() != 0 else x))
        return self.head(x)

    layers = {"linear": nn.Linear(3, 6), "norm": nn.BatchNorm1d(6), "head": nn.Linear(6, 2)}
    network, report = kernel_normalize(Network(call, **layers))
    assert list(report.replaced) == ["norm"]
    assert is_batch_independent(network)
    assert network(torch.rand(1, 3, 4, 4)).shape == (1, 2)  # a batch of one, too


def test_decoders_of_transposed_convolutions():
    """By the layer's own reference; a network that asks for the size of the output is left."""
    up = nn.ConvTranspose2d(4, 3, 4, 2, 1, bias=False)
    model = Network(lambda self, x: self.norm(self.up(x)).relu(), up=up, norm=nn.BatchNorm2d(3)).double()
    network, report = kernel_normalize(model, dropout_p=0.0)
    assert report == Report(["up"], ["norm"])
    layer = KNConvTranspose2d(4, 3, 4, 2, 1, dropout_p=0.0).double()
    layer.load_state_dict(model.up.state_dict(), strict=False)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert torch.equal(network(x), layer(x).relu())
    model.call = lambda self, x: self.norm(self.up(x, output_size=(10, 10)))
    assert kernel_normalize(model)[1].left == {"up": "it is called with the size of its output"}


def test_networks_of_sequences_and_of_volumes():
    """Audio and video: the pairs and the rest of one and three dimensions."""
    audio = nn.Sequential(nn.Conv1d(1, 4, 9, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2), nn.BatchNorm1d(4))
    network, report = kernel_normalize(audio)
    assert (report.convolutions, report.norms, list(report.replaced)) == (["0"], ["1"], ["4"])
    assert network(torch.randn(2, 1, 64)).shape == (2, 4, 7)
    video = torchvision.models.video.r3d_18
    with torch.device("meta"):
        network, report = kernel_normalize(video(num_classes=3))
        assert (len(report.convolutions), len(report.norms), report.left) == (20, 20, {})
        assert network(torch.rand(2, 3, 4, 16, 16)).shape == (2, 3)


def test_layers_of_timm_that_pad_by_the_size_of_their_input_and_standardize_their_filters():
    conv, pool = timm.layers.StdConv2dSame(3, 4, 3, 2), timm.layers.pool2d_same.MaxPool2dSame(3, 2)
    net = nn.Sequential(conv, timm.layers.GroupNormAct(4, 2), pool, nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)).double()
    converted, report = kernel_normalize(net, 0.0)
    assert (report.convolutions, report.norms) == (["0", "3"], ["1", "4"])
    assert converted.state_dict().keys() - {"0.bias"} == {"0.weight", "3.weight", "3.bias"}
    x = torch.randn(2, 3, 10, 13, dtype=torch.float64)
    filters = conv.weight - conv.weight.mean((1, 2, 3), keepdim=True)
    filters = filters / (filters.square().mean((1, 2, 3), keepdim=True) + conv.eps).sqrt()
    first = kn_conv(timm.layers.pad_same(x, (3, 3), (2, 2)), filters, None, 2, dropout_p=0.0).relu()
    expected = kn_conv(pool(first), net[3].weight, net[3].bias, dropout_p=0.0)
    torch.testing.assert_close(converted(x), expected)
    exported = torch.export.export(converted.eval(), (x,))
    torch.testing.assert_close(exported.module()(x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(converted))(x), expected)


def test_statistics_of_each_group():
    """The depthwise convolution alone, for the other has one group and the last one element in each."""
    convs = nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=4)
    model = nn.Sequential(*(layer for conv in convs for layer in (conv, nn.BatchNorm2d(4))))
    network, _ = kernel_normalize(model, group_statistics="own")
    assert [type(network[i]) for i in (0, 2, 4)] == [GroupKNConv2d, KNConv2d, KNConv2d]
    network, _ = kernel_normalize(model)
    assert type(network[0]) is KNConv2d
    with pytest.raises(ValueError, match="group_statistics must be one of all, own, got 'some'"):
        kernel_normalize(model, group_statistics="some")
