import copy
import io
import pickle

import pytest
import torch
from nn import naive
from torch import nn
from torch.autograd import forward_ad

from knlightning.analysis.measure import bytes_kept
from knlightning.nn import KernelNorm2d, KNConv1d, KNConv2d, KNConv3d, kn_conv
from knlightning.nn.dropout import draw_dropped, mask_of

CONVS = {1: (KNConv1d, nn.Conv1d), 2: (KNConv2d, nn.Conv2d), 3: (KNConv3d, nn.Conv3d)}


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_state_dict_is_that_of_a_convolution(spatial):
    ours, plain = CONVS[spatial]
    layer = ours(4, 6, 3, groups=2)
    layer.load_state_dict(plain(4, 6, 3, groups=2).state_dict())
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert ours(4, 6, 3, bias=False).bias is None


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_layers_follow_the_definition(spatial):
    torch.manual_seed(0)
    x = torch.randn(2, 4, *range(5, 5 + spatial), dtype=torch.float64)
    conv = CONVS[spatial][0](4, 6, 2, 2, 1, dropout_p=0.4, eval_statistics="clean").double().eval()
    stride, pads = (2,) * spatial, (1,) * 2 * spatial
    torch.testing.assert_close(conv(x), naive.kn_conv(x, conv.weight, conv.bias, stride, pads))
    torch.manual_seed(1)
    trained = conv.train()(x)
    torch.manual_seed(1)
    mask = mask_of(draw_dropped(x.numel(), 0.4), x)
    torch.testing.assert_close(trained, naive.kn_conv(x, conv.weight, conv.bias, stride, pads, 1, mask, 0.4))


@pytest.mark.parametrize("training", [True, False])
def test_all_settings_are_handed_on(training):
    x = torch.randn(2, 4, 5, 6)
    layer = KNConv2d(
        *(4, 6, 2, (1, 2), 1, 2, True, 0.3, 0.1, "expected"), dilation=(1, 2), padding_mode="circular"
    ).train(training)
    nn.init.normal_(layer.bias)
    settings = {"stride": (1, 2), "padding": 1, "groups": 2, "dropout_p": 0.3, "eval_statistics": "expected"}
    settings |= {"eps": 0.1, "dilation": (1, 2), "padding_mode": "circular", "training": training}
    torch.manual_seed(0)
    y = layer(x, relu_input=True, relu_output=True)
    torch.manual_seed(0)
    assert torch.equal(y, kn_conv(x.relu(), layer.weight, layer.bias, **settings).relu())


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_a_stack_of_layers_with_their_relu_keeps_what_plain_ones_keep(kernel_size):
    relu = KNConv2d(16, 16, kernel_size, relu_output=True)
    assert "relu_output=True" in repr(relu)
    torch.manual_seed(0)
    y = relu(torch.ones(1, 16, 3, 3))
    torch.manual_seed(0)
    assert torch.equal(y, relu(torch.ones(1, 16, 3, 3), relu_output=True))
    assert y.min() == 0
    plain = [layer for _ in range(4) for layer in (nn.Conv2d(16, 16, kernel_size), nn.ReLU())]
    nets = nn.Sequential(*(KNConv2d(16, 16, kernel_size, relu_output=True) for _ in range(4))), nn.Sequential(*plain)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.rand(8, 16, 32, 32).contiguous(memory_format=memory_format)
        ours, floor = (bytes_kept(net.to(memory_format=memory_format), x) for net in nets)
        assert ours < 1.2 * floor


def test_initialization_is_that_of_the_published_networks():
    torch.manual_seed(0)
    layer = KNConv2d(64, 256, 2)
    assert layer.weight.std().item() == pytest.approx((2 / (256 * 4)) ** 0.5, rel=0.02)
    assert not layer.bias.any()


@pytest.mark.parametrize("training", [True, False])
def test_channels_last(training):
    layer = KNConv2d(8, 16, 3, padding=1, dropout_p=0.0).train(training)
    x = torch.randn(2, 8, 6, 7)
    reference = layer(x)
    last = x.to(memory_format=torch.channels_last).requires_grad_()
    y = layer.to(memory_format=torch.channels_last)(last)
    torch.testing.assert_close(y, reference)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert last.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_in_place_operation_on_the_output(kernel_size, memory_format):
    layer = KNConv2d(4, 8, kernel_size).to(memory_format=memory_format)
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=memory_format).requires_grad_()
    grads = []
    for activation in (nn.ReLU(), nn.ReLU(inplace=True)):
        torch.manual_seed(0)
        grads.append(torch.autograd.grad(activation(layer(x)).square().sum(), (x, layer.weight, layer.bias)))
    for plain, in_place in zip(*grads, strict=True):
        assert torch.equal(plain, in_place)


def test_copies_and_pickles():
    layer = KNConv2d(4, 8, 3).eval()
    x = torch.randn(2, 4, 6, 6)
    torch_file = io.BytesIO()
    torch.save(layer, torch_file)
    torch_file.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(torch_file, weights_only=False)]
    for other in copies:
        assert torch.equal(layer(x), other(x))


def test_functional_call_and_vmap():
    """Gradients of single samples by torch.func equal those of a loop."""
    layer = KNConv2d(3, 5, 2, padding=(1, 0, 1, 0)).double().eval()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, image):
        return torch.func.functional_call(layer, parameters, (image[None],)).square().sum()

    batched = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, image in enumerate(x):
        one = torch.autograd.grad(layer(image[None]).square().sum(), tuple(layer.parameters()))
        torch.testing.assert_close(batched["weight"][i], one[0])
        torch.testing.assert_close(batched["bias"][i], one[1])
    trained = torch.func.vmap(lambda image: layer.train()(image[None]), randomness="different")(x)
    assert trained.shape == (4, 1, 5, 5, 5)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch itself calls it
def test_forward_mode_differentiation_without_a_graph():
    """The fused kernels would leave it out."""
    layer = KNConv2d(3, 5, 2).to(memory_format=torch.channels_last).eval()
    x, direction = torch.randn(2, 2, 3, 5, 5).movedim(2, -1).contiguous().movedim(-1, 2)
    with forward_ad.dual_level(), torch.no_grad():
        found = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, direction))).tangent
    torch.testing.assert_close(found, torch.func.jvp(layer, (x,), (direction,))[1])


def test_export():
    conv = KNConv2d(3, 5, 3, padding="same", dilation=2, padding_mode="reflect")
    layer = nn.Sequential(conv, nn.ReLU(), KernelNorm2d(2, dilation=2)).eval()
    x = torch.randn(2, 3, 8, 8)
    program = torch.export.export(
        layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch"), 2: torch.export.Dim.DYNAMIC},)
    )
    other = torch.randn(5, 3, 11, 8)
    torch.testing.assert_close(program.module()(other), layer(other))


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_compile_without_a_graph_break(training):
    layer = KNConv2d(8, 16, 3, padding=(2, 1, 2, 1), dropout_p=0.2, dilation=2, padding_mode="circular")
    layer.train(training)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    y = compiled(x)
    y.square().sum().backward()
    assert x.grad.isfinite().all()
    if not training:
        grad, x.grad = x.grad, None
        expected = layer(x)
        torch.testing.assert_close(y, expected)
        expected.square().sum().backward()
        torch.testing.assert_close(grad, x.grad)


def test_channels_that_groups_do_not_divide():
    with pytest.raises(ValueError, match=r"^groups must be a divisor of out_channels=6, got 4$"):
        KNConv2d(4, 6, 3, groups=4)
    with pytest.raises(ValueError, match=r"^groups must be a divisor of in_channels=4, got 0$"):
        KNConv2d(4, 6, 3, groups=0)
    with pytest.raises(ValueError, match=r"^in_channels must be a whole number at least 1, got 0$"):
        KNConv2d(0, 6, 3)
    with pytest.raises(TypeError, match=r"torch\.int64"):
        KNConv2d(4, 8, 3)(torch.ones(1, 4, 8, 8, dtype=torch.int64))
