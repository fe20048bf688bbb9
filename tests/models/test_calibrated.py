import pytest
import timm
import torch
from torch import nn
from torchvision.ops import Permute

from knlightning.models import calibrated, kernel_normalize
from knlightning.models.calibrated import calibrate
from knlightning.nn import KNConv1d, KNConv2d, KNConv3d


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: KNConv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0, 1, 2), groups=2), (4, 7, 6)),
        (lambda: KNConv2d(4, 4, 3, padding=1, groups=4, dilation=2, padding_mode="reflect", eps=0.1), (4, 7, 6)),
        (lambda: KNConv1d(3, 5, 4, stride=2), (3, 9)),
        (lambda: KNConv3d(2, 3, (1, 2, 3), padding="same"), (2, 3, 4, 5)),
    ],
)
def test_rows_are_what_the_weight_is_multiplied_with(make, shape):
    layer, x = make().double().eval(), torch.rand(1, *shape, dtype=torch.float64)
    rows = calibrated._windows(layer, x).unflatten(1, (layer.groups, -1))
    product = torch.einsum("pgi,goi->pgo", rows, layer.weight.flatten(1).unflatten(0, (layer.groups, -1))).flatten(1)
    torch.testing.assert_close(product.mT.view_as(layer(x)[0]), layer(x)[0])


def normalized(*shape):
    """Images of which each pixel is normalized already, so that a KNConv of 1x1 computes what a convolution does."""
    x = torch.randn(*shape)
    return (x - x.mean(1, keepdim=True)) / x.var(1, keepdim=True, unbiased=False).sqrt()


@pytest.mark.parametrize("form", ["behind", "with activation", "in front"])
def test_a_layer_that_can_compute_the_same_does(form, monkeypatch):
    monkeypatch.setattr(calibrated, "RIDGE", 1e-9)
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4 if form == "in front" else 6)
    if form == "with activation":
        norm = timm.layers.BatchNormAct2d(6)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2)
    conv = nn.Conv2d(4, 6, 1, bias=False)
    layers = [norm, conv] if form == "in front" else [conv, norm]
    original = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).eval()
    images = [normalized(4, 4, 3, 3) for _ in range(9)]
    loader = iter([(batch, "labels") for batch in images])
    converted, _ = kernel_normalize(original, eval_statistics="clean", calibrate=loader)
    assert len(list(loader)) == 1  # eight are enough
    torch.testing.assert_close(converted(images[8]), original(images[8]), rtol=1e-3, atol=1e-3)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in converted.modules())
    plain, _ = kernel_normalize(original)
    assert (plain(images[8]) - original(images[8])).abs().max() > 0.1


class Auxiliary(nn.Module):
    """A network with a branch that training alone calls, as GoogLeNet has them."""

    def __init__(self, *layers):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x), self.branch(x) if self.training else None


@pytest.mark.parametrize("norm", ["batch", "channels last"])
def test_layers_make_up_for_the_errors_of_those_before(norm):
    def make_norm():
        last = Permute([0, 2, 3, 1]), nn.LayerNorm(8), Permute([0, 3, 1, 2])
        return nn.BatchNorm2d(8) if norm == "batch" else nn.Sequential(*last)

    torch.manual_seed(0)
    original = Auxiliary(
        nn.Conv2d(3, 8, 3, padding=1), make_norm(), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), make_norm(), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    images = [torch.rand(4, 3, 8, 7) for _ in range(8)]
    for _ in range(20):
        original(images[0])  # running statistics
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    converted, _ = kernel_normalize(original, dropout_p=0.0)
    fitted, _ = kernel_normalize(original, dropout_p=0.0)
    fitted.layers[3].eval()
    calibrate(original, fitted, images)
    assert [layer.training for layer in fitted.layers] == [number != 3 for number in range(9)]
    assert torch.equal(fitted.branch[0].weight, original.branch[0].weight)
    with torch.no_grad():
        wanted, _ = original.eval()(images[0])
        error, before_it = ((net.eval()(images[0])[0] - wanted).square().mean() for net in (fitted, converted))
    assert error < 0.1 * before_it
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())


def test_no_images():
    with pytest.raises(ValueError, match="calibrate: there is no batch of images"):
        kernel_normalize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), calibrate=[])
