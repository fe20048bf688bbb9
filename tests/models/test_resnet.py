import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from knlightning.models import resnet8, resnet18, resnet34, resnet50
from knlightning.nn import KNConv2d, kernel_norm, kn_conv

MODELS = {"resnet18": resnet18, "resnet34": resnet34, "resnet50": resnet50}


@pytest.mark.parametrize("name", MODELS)
def test_weights_of_torchvision_load_and_give_its_outputs(name):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(num_classes=5)
    ours = MODELS[name](num_classes=5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 65, 66)
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))


def test_initialization_is_that_of_torchvision():
    for norm in ("batch", "none", "kernel"):
        torch.manual_seed(0)
        model = resnet18(norm=norm, low_resolution=True)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 4:
                deviation = (2 / (parameter.shape[0] * parameter[0, 0].numel())) ** 0.5
                assert parameter.std().item() == pytest.approx(deviation, rel=0.1), name
            elif not name.startswith("fc"):
                assert torch.equal(parameter, torch.full_like(parameter, name.endswith("weight"))), name


def test_stem_for_small_images():
    model = resnet18(low_resolution=True)
    shapes = []
    model.layer1.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    model(torch.rand(2, 3, 32, 32))
    assert shapes == [(2, 64, 32, 32)]


def test_none_differs_from_kernel_in_the_normalization_alone():
    kernel, none = (resnet18(num_classes=7, norm=norm).state_dict() for norm in ("kernel", "none"))
    assert {name: value.shape for name, value in kernel.items()} == {name: v.shape for name, v in none.items()}
    assert not any(isinstance(m, nn.BatchNorm2d | KNConv2d) for m in resnet18(num_classes=7, norm="none").modules())


@pytest.mark.parametrize("norm", ["kernel", "layer"])
def test_resnet8_is_the_network_that_its_description_says(norm):
    torch.manual_seed(0)
    model = resnet8(num_classes=6, norm=norm, activation="mish", dropout_p=0.0).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    weights = iter(list(model.parameters()))

    def layer(x):
        if norm == "kernel":
            return F.mish(kn_conv(x, next(weights), next(weights), padding=1, dropout_p=0.0))
        return F.mish(F.group_norm(F.conv2d(x, next(weights), padding=1), 1, next(weights), next(weights)))

    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    x = F.max_pool2d(layer(layer(images)), 2)
    x = x + layer(layer(x))
    x = F.max_pool2d(layer(x), 2)
    x = x + layer(layer(x))
    x = F.max_pool2d(x, 2)
    if norm == "kernel":
        x = kernel_norm(x, 1, dropout_p=0.0)
    x = F.linear(F.adaptive_avg_pool2d(x, 2).flatten(1), next(weights), next(weights))
    assert next(weights, None) is None
    torch.testing.assert_close(model(images), x)
