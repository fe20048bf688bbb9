"""What holds for every network of the list, with every normalization that it can be built with."""

import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

from knlightning import models
from knlightning.checks import ArgumentError
from knlightning.models import list_models
from knlightning.nn import KernelNorm2d, KNConv2d
from knlightning.nn.normalization import NORMS, PRIVATE_NORMS

MODELS = {model.name: model for model in list_models() if not model.name.endswith(("101", "152"))}  # blocks of 50
CHOOSING = [name for name, model in MODELS.items() if model.norm]
DEEP = ("34", "50", "121", "16")
CASES = [
    # the networks of 34 layers and more are built of the same blocks as the others, and take longer
    pytest.param(name, norm, marks=[pytest.mark.slow] if name.endswith(DEEP) and norm != model.norm else [])
    for name, model in MODELS.items()
    for norm in (NORMS if model.norm else [None])
]
# parameters by low resolution and classes, as they are published: CIFAR-100 as in Table 1, ImageNet as in Table 2,
# ImageNet 32x32 as in Table 4, Cityscapes as in Table 3; and those of torchvision
COUNTS = {
    "convnext_tiny": {(None, 1000): 28_589_128},
    "densenet121": {(False, 1000): 7_978_856},
    "fcn_knresnet18": {(False, 19): 13_525_380},
    "fcn_knresnet34": {(False, 19): 23_399_315},
    "fcn_knresnet50": {(False, 19): 32_873_971},
    "fcn_resnet18": {(False, 19): 13_546_579},
    "fcn_resnet34": {(False, 19): 23_654_739},
    "fcn_resnet50": {(False, 19): 32_955_987},
    "knconvnext_tiny": {(None, 1000): 28_587_784},
    "knresnet18": {(True, 100): 11_215_840, (False, 1000): 11_685_220, (True, 1000): 11_677_540},
    "knresnet34": {(True, 100): 21_323_450, (False, 1000): 21_792_830, (True, 1000): 21_785_150},
    "knresnet50": {(True, 100): 23_681_570, (False, 1000): 25_556_390, (True, 1000): 25_525_670},
    "preact_resnet18": {(True, 100): 11_218_340},
    "preact_resnet34": {(True, 100): 21_326_500},
    "preact_resnet50": {(True, 100): 23_697_572},
    "resnet18": {(True, 100): 11_220_132, (False, 1000): 11_689_512, (True, 1000): 11_681_832},
    "resnet34": {(True, 100): 21_328_292, (False, 1000): 21_797_672},
    "resnet50": {(True, 100): 23_705_252, (False, 1000): 25_557_032},
    "resnet101": {(False, 1000): 44_549_160},
    "resnet152": {(False, 1000): 60_192_808},
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    make = getattr(models, name)
    for (low_resolution, num_classes), count in COUNTS[name].items():
        arguments = {} if low_resolution is None else {"low_resolution": low_resolution}
        # an affine transformation of each channel has as many parameters as that of batch normalization
        for norm in ("batch", "layer", "group") if name.startswith(("resnet", "preact")) else (None,):
            with torch.device("meta"):
                model = make(num_classes=num_classes, **arguments, **({"norm": norm} if norm else {}))
            assert sum(p.numel() for p in model.parameters()) == count


def build(name, norm=None, **arguments):
    """Build a network, for small images if it can be, and two images."""
    torch.manual_seed(0)
    if norm:
        arguments["norm"] = norm
    if "low_resolution" in MODELS[name].defaults:
        arguments["low_resolution"] = True
    # torch normalizes instances of more than one pixel only, which is what smaller images come down to
    sides = (17, 18) if arguments.get("low_resolution") and norm != "instance" else (33, 34)
    return MODELS[name].make(num_classes=7, **arguments), torch.rand(2, 3, *sides)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_trains_and_evaluates(name, norm):
    if norm and not MODELS[name].allows(norm):
        return  # test_registry.py knows which these are
    model, images = build(name, norm)
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0  # it may leave a block out for both images
    torch.manual_seed(1)
    logits = model(images)
    assert logits.shape == ((2, 7, *images.shape[2:]) if MODELS[name].task == "segmentation" else (2, 7))
    logits.logsumexp(1).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key

    other = torch.cat((5 * images[:1].flip(-1), images[1:]))
    with torch.no_grad():
        torch.manual_seed(1)
        moved = (model(other)[1] - logits[1]).abs().max() / logits[1].abs().max()
        assert (moved < 1e-3) == (norm is None or norm in PRIVATE_NORMS), "of what is done to another sample"
        model.eval()
        torch.testing.assert_close(model(images)[1:], model(images[1:]), rtol=1e-3, atol=1e-3)


# the linear layers of VGG take long to draw
@pytest.mark.parametrize("name", [n if "vgg" not in n else pytest.param(n, marks=pytest.mark.slow) for n in CHOOSING])
def test_large_images_and_the_other_activations(name):
    make = MODELS[name].make
    model = make(num_classes=5, norm="layer", low_resolution=False, activation="silu").eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 97, 130)).shape[:2] == (1, 5)
    kinds = {type(module).__name__ for module in model.modules()}
    assert "SiLU" in kinds
    assert "ReLU" not in kinds
    assert kinds & {"BatchNorm2d", "KNConv2d", "KernelNorm2d"} == set()


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if "eval_statistics" in model.defaults])
def test_settings_reach_every_kernel_normalized_layer(name):
    settings = {"norm": "kernel"} if name in CHOOSING else {}
    with torch.device("meta"):
        model = MODELS[name].make(dropout_p=0.02, eps=0.5, eval_statistics="expected", **settings)
    layers = [module for module in model.modules() if isinstance(module, KNConv2d | KernelNorm2d)]
    assert {(layer.eps, layer.eval_statistics) for layer in layers} == {(0.5, "expected")}
    assert {layer.dropout_p for layer in layers if isinstance(layer, KNConv2d)} == {0.02}
    assert all(layer.dropout_p == pytest.approx(0.1) for layer in layers if isinstance(layer, KernelNorm2d))


@pytest.mark.parametrize("norm", ["layer", "kernel"])
@pytest.mark.parametrize("name", ["densenet121", "fcn_knresnet8", "fcn_resnet8", "fcn_resnet18", "resnet8", "resnet50"])
def test_hooks_may_watch_every_layer(name, norm):
    """Backward hooks, such as those of private training, forbid changes in place of what a layer returns."""
    model, images = build(name, norm)
    layers = {m for m in model.modules() if next(m.parameters(recurse=False), None) is not None}
    seen = set()
    for layer in layers:
        layer.register_full_backward_hook(lambda layer, *_: seen.add(layer))
    model(images.requires_grad_()).sum().backward()
    assert seen == layers


@pytest.mark.parametrize("low_resolution", [True, False])
@pytest.mark.parametrize("name", [n for n in CHOOSING if not n.startswith(("kn", "fcn", "resnet13"))])
def test_kernel_makes_every_convolution_and_its_norm_a_knconv(name, low_resolution):
    with torch.device("meta"):
        kernel, batch = (MODELS[name].make(norm=norm, low_resolution=low_resolution) for norm in ("kernel", "batch"))
    layers = {key: module for key, module in kernel.named_modules() if isinstance(module, KNConv2d)}
    convs = {key: module for key, module in batch.named_modules() if isinstance(module, nn.Conv2d)}
    assert layers.keys() == convs.keys()
    for key, layer in layers.items():
        conv = convs[key]
        padding = layer.padding if isinstance(layer.padding, tuple) else (layer.padding,) * 2
        assert (layer.weight.shape, layer.stride, padding) == (conv.weight.shape, conv.stride, conv.padding), key
        assert layer.bias is not None, key
    assert not any(isinstance(module, nn.Conv2d | nn.BatchNorm2d) for module in kernel.modules())
    norms = sum(isinstance(module, KernelNorm2d) for module in kernel.modules())  # before the classifier
    assert norms == name.startswith(("preact", "densenet", "resnet8"))


@pytest.mark.parametrize("name", CHOOSING)
def test_eps_reaches_every_other_norm(name):
    with torch.device("meta"):
        model = MODELS[name].make(norm="batch", eps=0.5)
    assert {module.eps for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {0.5}


@pytest.mark.parametrize("name", MODELS)
def test_wrong_arguments(name):
    make = MODELS[name].make
    with pytest.raises(TypeError, match="positional argument"):
        make(7)
    with pytest.raises(TypeError, match="unexpected keyword argument 'classes'"):
        make(classes=7)
    with pytest.raises(ArgumentError, match="num_classes must be a whole number at least 1, got 0"):
        make(num_classes=0)
    if name in CHOOSING:
        with pytest.raises(ArgumentError, match=r"norm must be one of batch, .*, kernel, none, got 'layers'"):
            make(norm="layers")
        with pytest.raises(ValueError, match="activation must be one of relu, mish, gelu, silu, got 'tanh'"):
            make(activation="tanh")
    if "dropout_p" in MODELS[name].defaults:
        with pytest.raises(ValueError, match="dropout_p"):
            make(dropout_p=1.0, **({"norm": "kernel"} if name in CHOOSING else {}))
