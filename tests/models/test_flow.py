from torch import nn

from knlightning.models.flow import Flow
from knlightning.nn import KNConv2d


class Residual(nn.Module):
    """A convolution and a norm, then a sum; a pre-activated pair; one layer that is not called."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.pre, self.act, self.after = nn.GroupNorm(1, 3), nn.ReLU(), nn.Conv2d(3, 3, 1)
        self.kernel, self.resting = KNConv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = x + self.norm(self.conv(x))
        return self.kernel(self.after(self.act(self.pre(x))))


def test_before_and_after_a_norm():
    flow = Flow(Residual())
    assert flow.norms() == ["norm", "pre"]
    assert flow.before("norm") == {"conv"}
    assert flow.after("norm") == "its result goes to add"
    assert flow.before("pre") == "its input comes from add"
    assert flow.after("pre") == {"after"}
    assert flow.activations("pre") == ["act"] * 2  # in training and in evaluation
    assert flow.unpaired("resting") == "it is not called"
    assert "kernel" not in flow.layers
    assert flow.unpaired("conv") == "no normalization forms a pair with it: its result goes to norm"
    assert flow.unpaired("kernel") == "it keeps statistics of the batch, and is no known normalization"


def test_the_network_is_not_changed_and_what_cannot_be_traced_is_named():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Residual()

        def forward(self, x):
            return self.block(x) if x.sum() > 0 else x

    model = Untraceable()
    flow = Flow(model)
    assert flow.before("block.norm") == {"block.conv"}
    assert flow.untraced[""].startswith("Untraceable cannot be traced (TraceError: ")
    assert model.training
    assert int(model.block.norm.num_batches_tracked) == 0
