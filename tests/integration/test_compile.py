import pytest
import torch
from torchvision.models.resnet import BasicBlock, ResNet

from knlightning.models import kernel_normalize, knresnet18

NETWORKS = {
    "KNResNet-18": lambda: knresnet18(num_classes=10, low_resolution=True, dropout_p=0.0),
    "converted ResNet": lambda: kernel_normalize(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10), dropout_p=0.0)[0],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_inductor_compiles_whole_networks_to_the_same_numbers(name):
    """Forward pass and gradients in training, in one graph; without dropout, whose masks compilers draw otherwise.

    In float64, because windows that are nearly constant magnify rounding.
    """
    torch.manual_seed(0)
    net = NETWORKS[name]().train().double()
    images, direction = (torch.randn(size, dtype=torch.float64) for size in ((2, 3, 32, 32), (2, 10)))
    found = []
    for run in (net, torch.compile(net, fullgraph=True)):
        output = run(images)
        found.append((output, *torch.autograd.grad(output, list(net.parameters()), direction)))
    for eager, compiled in zip(*found, strict=True):
        assert (eager - compiled).norm() < 1e-8 * eager.norm()
