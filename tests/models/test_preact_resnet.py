import pytest
import torch
from torch import nn

from knlightning.models import preact_resnet18, preact_resnet50


@pytest.mark.parametrize("norm", ["batch", "kernel"])
@pytest.mark.parametrize("make", [preact_resnet18, preact_resnet50])
def test_order_within_a_block(make, norm):
    """The identity passes a block unchanged; a shortcut with a convolution starts at the first activation."""
    torch.manual_seed(0)
    model = make(num_classes=5, norm=norm, low_resolution=True).eval()
    first, second = model.stages[1][:2]
    x = torch.randn(2, second.residual[0].in_channels, 6, 6)
    nn.init.zeros_(second.residual[-1].weight)
    assert torch.equal(second(x), x)
    x = torch.randn(2, first.residual[0].in_channels, 6, 6)
    activated = first.act(x)
    assert activated.min() == 0
    torch.testing.assert_close(first(x), first.shortcut(activated) + first.residual(activated))
    assert first(x).shape == (2, second.residual[0].in_channels, 3, 3)


def test_norm_and_activation_stand_before_the_pooling():
    model = preact_resnet18(num_classes=5, norm="layer", low_resolution=True)
    features = []
    model.pool.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    model(torch.rand(2, 3, 32, 32))
    assert features[0].shape == (2, 512, 4, 4)
    assert features[0].min() == 0
    assert isinstance(model.head[0], nn.GroupNorm)


def test_convolutions_have_a_bias_where_no_norm_has():
    for norm, bias in (("batch", False), ("none", True)):
        convolutions = [m for m in preact_resnet18(norm=norm).modules() if isinstance(m, nn.Conv2d)]
        assert len(convolutions) == 20
        assert all((m.bias is not None) == bias for m in convolutions)
