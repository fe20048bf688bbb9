"""What the residual networks are built of: their options, and the layers that follow from these."""

from dataclasses import dataclass

from torch import Tensor, nn

from knlightning.checks import check_choice, check_number
from knlightning.nn import Activation, KernelNorm2d, KNConv2d, Norm, make_activation, make_norm
from knlightning.nn.functional import EvalStatistics
from knlightning.nn.normalization import NORMS

Padding = int | tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What all networks of this folder let one choose.

    Args:
        num_classes: Number of classes.
        norm: Name of the normalization, as in `knlightning.nn.normalization.NORMS`. "kernel" makes each
            convolution, together with the norm beside it, a KNConv. Any other builds the same network of plain
            convolutions and norms. The groups of "group" and of "local_context" do not divide the channels of all
            networks.
        activation: Name of the activation.
        low_resolution: Whether the stem is a 3x3 convolution without pooling, for images such as 32x32, in place of
            one of 7x7 with stride 2 and pooling.
        dropout_p: Dropout probability of KNConv in [0, 1), of no effect with other norms. That of a KernelNorm before
            the classifier is five times as high, at most 0.25, and for segmentation at most 0.5.
        eps: Added to the variance, in [0, 1].
        eval_statistics: The moments that kernel normalized layers use in evaluation, as in
            `knlightning.nn.KNConv2d`.

    Raises:
        ArgumentError: If an argument is out of its range.
    """

    num_classes: int = 1000
    norm: Norm = "kernel"
    activation: Activation = "relu"
    low_resolution: bool = False
    dropout_p: float = 0.05
    eps: float = 1e-5
    eval_statistics: EvalStatistics = "expected"

    def __post_init__(self) -> None:
        check_number("num_classes", self.num_classes, at_least=1, integer=True)
        check_choice("norm", self.norm, tuple(NORMS))
        check_number("dropout_p", self.dropout_p, at_least=0, below=1)  # also where it has no effect
        check_number("eps", self.eps, at_least=0, at_most=1)


@dataclass(frozen=True)
class Stage:
    """A row of residual blocks at one resolution.

    Args:
        channels: Channels of the residual stream.
        blocks: Number of residual blocks.
        inner: Channels between the convolutions of a block.
        pointwise: Whether the outer convolutions of the bottlenecks, and the transition before the stage, are 1x1.
        k: Kernel size of the basic blocks and of the transition before the stage, 2 or 3.
    """

    channels: int
    blocks: int
    inner: int
    pointwise: bool = False
    k: int = 2


@dataclass(frozen=True)
class Layers:
    """Makes the convolutions, norms and activations of a network.

    With "kernel" every convolution is a KNConv, and no norm stands beside the activations. With any other norm the
    convolutions are plain, and each activation has a norm before it.

    Args:
        options: Options of the network.
        bias: Whether plain convolutions have a bias; KNConvs always have one.
        max_head_dropout: Largest dropout probability of the KernelNorm before the classifier.
    """

    options: Options
    bias: bool = True
    max_head_dropout: float = 0.25

    @property
    def kernel(self) -> bool:
        """Whether the network is kernel normalized."""
        return self.options.norm == "kernel"

    def conv(self, in_channels: int, out_channels: int, k: int, stride: int = 1, padding: Padding = 0) -> nn.Module:
        """Make a convolution, kernel normalized if the network is."""
        if self.kernel:
            return KNConv2d(
                in_channels,
                out_channels,
                k,
                stride,
                padding,
                dropout_p=self.options.dropout_p,
                eps=self.options.eps,
                eval_statistics=self.options.eval_statistics,
            )
        around = padding if isinstance(padding, int) else 0
        conv = nn.Conv2d(in_channels, out_channels, k, stride, around, bias=self.bias)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        return conv if isinstance(padding, int) else nn.Sequential(nn.ZeroPad2d(padding), conv)

    def norm(self, channels: int) -> nn.Module:
        """Make the norm that stands beside an activation: the identity if the convolutions normalize."""
        return nn.Identity() if self.kernel else make_norm(self.options.norm, channels, self.options.eps)

    def act(self) -> nn.Module:
        """Make an activation."""
        return make_activation(self.options.activation)

    def norm_act(self, channels: int) -> nn.Module:
        """Make an activation, with the norm before it if there is one."""
        norm = self.norm(channels)
        return self.act() if isinstance(norm, nn.Identity) else nn.Sequential(norm, self.act())

    def head_norm(self) -> KernelNorm2d:
        """Make the KernelNorm before the classifier of a kernel normalized network."""
        dropout_p = min(5 * self.options.dropout_p, self.max_head_dropout)
        return KernelNorm2d(1, dropout_p=dropout_p, eps=self.options.eps, eval_statistics=self.options.eval_statistics)

    def head(self, channels: int) -> nn.Module:
        """Make what stands before the global average pooling, or before the classifier of each position."""
        return nn.Sequential(self.head_norm(), self.act()) if self.kernel else self.norm_act(channels)


def interchange(model: nn.Module, layers: Layers) -> None:
    """Put the layers of the options in place of those of a network with batch normalization and ReLUs.

    Convolutions stay as they are, unless the network becomes kernel normalized or has no normalization.
    """
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.BatchNorm2d):
                module.add_module(name, layers.norm(layer.num_features))
            elif isinstance(layer, nn.ReLU):
                module.add_module(name, layers.act())
            elif isinstance(layer, nn.Conv2d) and layers.options.norm in ("kernel", "none"):
                geometry = (layer.kernel_size[0], layer.stride[0], int(layer.padding[0]))
                module.add_module(name, layers.conv(layer.in_channels, layer.out_channels, *geometry))


def convolve(
    conv: nn.Module,
    x: Tensor,
    *,
    before: nn.Module | None = None,
    after: nn.Module | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Apply an activation, a convolution and another activation, then add a residual.

    A KNConv does all of this itself where the activations are ReLUs; the network then keeps half as much for backward.
    What it returns must not be changed in place.

    Args:
        conv: Convolution, plain or kernel normalized.
        x: Its input [N, C, H, W].
        before: Activation of the input, with its norm if there is one.
        after: Activation of the output, likewise.
        residual: Tensor of the output's shape.

    Returns:
        Tensor [N, O, h, w].
    """
    if type(conv) is KNConv2d and all(isinstance(act, nn.ReLU | None) for act in (before, after)):
        relus = {"relu_input": before is not None, "relu_output": after is not None}
        return conv(x, **relus, residual=residual, keep_output=True)
    out = conv(x if before is None else before(x))
    if after is not None:
        out = after(out)
    return out if residual is None else residual + out
