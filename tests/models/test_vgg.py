import pytest
import torch
import torchvision

from knlightning.models import vgg11, vgg16


@pytest.mark.parametrize(("make", "count"), [(vgg11, 132_868_840), (vgg16, 138_365_992)])
def test_parameters_and_layers_are_those_of_torchvision(make, count):
    with torch.device("meta"):
        ours, theirs = make(), getattr(torchvision.models, f"{make.__name__}_bn")()
    shapes = [{name: p.shape for name, p in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in ours.parameters()) == count
    assert [type(module) for module in ours.features] == [type(module) for module in theirs.features]


def test_features_equal_those_of_torchvision():
    torch.manual_seed(0)
    ours = vgg11(num_classes=5, low_resolution=True)
    theirs = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"][:-1], batch_norm=True)
    theirs.load_state_dict(ours.features.state_dict())
    x = torch.rand(2, 3, 32, 33)
    features = theirs(x)
    torch.testing.assert_close(ours.features(x), features)
    torch.testing.assert_close(ours(x), ours.classifier(features.mean((2, 3))))
