import pytest
import torch
from torch import nn
from torch.nn import functional as F

from knlightning.models import knresnet8
from knlightning.tasks.grad_cam import grad_cam, highlighted


@pytest.mark.parametrize("inference", [False, True])
def test_with_global_pooling_it_is_the_class_activation_map(inference):
    """There the gradient of a logit is the weight of the last layer (Zhou et al., 2016)."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))
    classes = torch.tensor([2, 0])
    with torch.inference_mode(inference):
        images = torch.rand(2, 3, 8, 8)
        found = grad_cam(network, images, classes)
    with torch.no_grad():
        features = network[:2](images)
        maps = torch.einsum("nk,nkhw->nhw", network[4].weight[classes], features).relu()
        maps = F.interpolate(maps[:, None], (8, 8), mode="bilinear", align_corners=False)[:, 0]
        expected = maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    torch.testing.assert_close(found, expected)
    assert not network[0]._forward_hooks
    assert network[0].weight.grad is None


def test_kernel_normalized_networks_have_maps():
    torch.manual_seed(0)
    network = knresnet8(num_classes=3, low_resolution=True).eval()
    maps = grad_cam(network, torch.rand(2, 3, 32, 32), torch.tensor([0, 2]))
    assert maps.shape == (2, 32, 32)
    assert maps.min() >= 0
    assert maps.amax(dim=(1, 2)).tolist() == pytest.approx([1, 1])


def test_a_network_without_maps_is_refused():
    with pytest.raises(ValueError, match="Sequential has no layer that gives maps"):
        grad_cam(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(1, 3, 2, 2), torch.tensor([0]))


def test_what_says_little_is_dark():
    images = highlighted(torch.ones(1, 3, 1, 2), torch.tensor([[[0.0, 1.0]]]))
    assert images[0, 0].tolist() == [[pytest.approx(0.2), 1.0]]
