"""The networks that `knl benchmark` compares: one architecture, several ways to normalize it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision.models as torchvision_models
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from knlightning import models
from knlightning.models import knresnet18, knresnet34, knresnet50
from knlightning.nn import KernelNorm2d, KNConv2d
from knlightning.nn.windows import Window

NetworkName = Literal[
    "resnet18", "resnet34", "resnet50", "layers", "fcn_resnet18", "fcn_resnet34", "fcn_resnet50",
    "torchvision_resnet50", "torchvision_mobilenet_v2", "torchvision_efficientnet_b0", "torchvision_densenet121",
]  # fmt: skip
Precision = Literal["float32", "bfloat16"]
Variant = Literal["floor", "kernel", "algorithm1", "batch", "batch-primitives", "group", "layer"]

LAYERS = 4
CHANNELS = 256
LOW_RESOLUTION = 96
"""Images with smaller sides go through the stem for small images, a 3x3 convolution without pooling."""


@dataclass(frozen=True)
class Case:
    """One row of the benchmark: a network, and the images it is given.

    Args:
        network: A residual network, its fully convolutional relative for segmentation ("fcn_..."), or "layers": four
            convolutions of 256 filters, as in Table 8 of the paper; or a network of torchvision, converted.
        variant: How it normalizes. "floor": the kernel normalized network with plain convolutions and no
            normalization; "kernel": with KNConv; "algorithm1": with KNConv as published; the others are torchvision's
            ResNets, or plain convolutions each with a norm: "batch", "batch-primitives" (BatchNorm from elementary
            operations), "group" (GroupNorm with 32 groups) and "layer" (GroupNorm with one).
        resolution: Height and width of the images; for segmentation height of the crops, which are twice as wide.
            Then evaluation is of one whole image, twice as high and as wide as a crop, as in Cityscapes.
        batch_size: Images in a batch.
        stride: Stride of each of the "layers".
        kernel_size: Kernel size of each of the "layers".
        precision: "bfloat16" for autocast; "float32" computes as torch is set to, on a GPU convolutions in TF32.
        compiled: Whether `torch.compile` compiles it.
    """

    network: NetworkName
    variant: Variant
    resolution: int
    batch_size: int
    stride: int = 1
    kernel_size: int = 3
    precision: Precision = "float32"
    compiled: bool = False

    @property
    def setting(self) -> str:
        """What the case shares with those that it is compared with."""
        name: str = self.network
        if name == "layers":
            name = f"{LAYERS} layers {self.kernel_size}x{self.kernel_size}, {CHANNELS} filters, stride {self.stride}"
        height, width = self.shape[2:]
        how = (", bfloat16" if self.precision == "bfloat16" else "") + (", compiled" if self.compiled else "")
        return f"{name}, {width}x{height}, batch {self.batch_size}{how}"

    @property
    def segmentation(self) -> bool:
        """Whether the network tells the class of every pixel."""
        return self.network.startswith("fcn_")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of a batch in training."""
        return self.batch_size, 3, self.resolution, self.resolution * (1 + self.segmentation)

    @property
    def evaluation_shape(self) -> tuple[int, int, int, int]:
        """Shape of a batch in evaluation."""
        return (1, 3, 2 * self.resolution, 4 * self.resolution) if self.segmentation else self.shape


class AlgorithmOneConv2d(KNConv2d):
    """KNConv as published: the windows are unfolded for their statistics, and dropout is on in evaluation too.

    Arguments and shapes as in `knlightning.nn.KNConv2d`. Source: Nasirigerdeh et al. (TMLR 2024), Algorithm 1.
    """

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override] # none of the operations around it
        window = Window.of(2, self.kernel_size, self.stride, self.padding, self.dilation)
        padded = F.pad(input, window.pads, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        units = F.dropout(padded, self.dropout_p)
        units = replace(window, padding=((0, 0), (0, 0))).unfold(units)  # [N, C, p_h, p_w, k_h, k_w]
        var, mean = (m.unsqueeze(1) for m in torch.var_mean(units, (1, 4, 5), correction=0))
        output = F.conv2d(padded, self.weight, None, self.stride, 0, self.dilation, self.groups)
        output = output - mean * self.weight.sum((1, 2, 3)).view(-1, 1, 1)
        output = output / torch.sqrt(var + self.eps)
        return output if self.bias is None else output + self.bias.view(-1, 1, 1)


class PrimitiveBatchNorm2d(nn.BatchNorm2d):
    """Batch normalization from elementary operations, as in Zhang et al., Dive into Deep Learning, section 8.5."""

    def forward(self, input: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        if self.training:
            mean = input.mean((0, 2, 3), keepdim=True)
            var = ((input - mean) ** 2).mean((0, 2, 3), keepdim=True)
            with torch.no_grad():
                self.running_mean.lerp_(mean.flatten(), self.momentum or 0.0)
                self.running_var.lerp_(var.flatten(), self.momentum or 0.0)
        else:
            mean, var = self.running_mean.view(-1, 1, 1), self.running_var.view(-1, 1, 1)
        normalized = (input - mean) / torch.sqrt(var + self.eps)
        return self.weight.view(-1, 1, 1) * normalized + self.bias.view(-1, 1, 1)


KNRESNETS = {"resnet18": knresnet18, "resnet34": knresnet34, "resnet50": knresnet50}
RESNETS = {name: getattr(torchvision_models, name) for name in KNRESNETS}
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "batch-primitives": PrimitiveBatchNorm2d,
    "group": partial(nn.GroupNorm, 32),
    "layer": partial(nn.GroupNorm, 1),
}


def build(case: Case) -> nn.Module:
    """Build the network of a case, with dropout as in the paper.

    It maps images [N, 3, H, W] to at least 100 numbers each. Residual networks have 1000 classes, for small images
    100; those for segmentation tell 19 classes of every pixel.
    """
    if case.network.startswith("torchvision_"):
        net: nn.Module = _converted(case)
    elif case.network == "layers":
        layers = [_layer(case, 3 if i == 0 else CHANNELS) for i in range(LAYERS)]
        net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    else:
        net = _fcn(case) if case.segmentation else _resnet(case)
    if case.variant == "algorithm1":
        compute_as_published(net)
    return net


def _converted(case: Case) -> nn.Module:
    """Make a network of torchvision with another normalization, or kernel normalize it."""
    net: nn.Module = getattr(torchvision_models, case.network.removeprefix("torchvision_"))()
    if case.variant == "kernel":
        return models.kernel_normalize(net)[0]
    for name, norm in list(net.named_modules()):
        if isinstance(norm, nn.BatchNorm2d) and case.variant == "floor":
            net.set_submodule(name, nn.Identity())
        elif isinstance(norm, nn.BatchNorm2d) and case.variant == "group":
            net.set_submodule(name, nn.GroupNorm(math.gcd(32, norm.num_features), norm.num_features))
    return net


def _fcn(case: Case) -> nn.Module:
    if case.variant in NORMS:
        net: nn.Module = getattr(models, case.network)(norm=case.variant)
        return net
    make = getattr(models, case.network.replace("resnet", "knresnet"))
    return make(norm="none" if case.variant == "floor" else "kernel")


def _resnet(case: Case) -> nn.Module:
    low = case.resolution < LOW_RESOLUTION
    classes = 100 if low else 1000
    if case.variant not in NORMS:
        make = KNRESNETS[case.network]
        return make(num_classes=classes, low_resolution=low, norm="none" if case.variant == "floor" else "kernel")
    net: nn.Module = RESNETS[case.network](num_classes=classes, norm_layer=NORMS[case.variant])
    if low:
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return net


def compute_as_published(net: nn.Module) -> None:
    """Let a kernel normalized network compute what it computes by Algorithm 1, with the same parameters."""
    for module in net.modules():
        if isinstance(module, KNConv2d):
            module.__class__ = AlgorithmOneConv2d
        elif isinstance(module, KernelNorm2d):
            module.eval_statistics = "sampled"


def _layer(case: Case, in_channels: int) -> nn.Module:
    geometry = (in_channels, CHANNELS, case.kernel_size, case.stride, case.kernel_size // 2)
    if case.variant in ("kernel", "algorithm1"):
        return KNConv2d(*geometry)
    conv = nn.Conv2d(*geometry)
    return conv if case.variant == "floor" else nn.Sequential(conv, NORMS[case.variant](CHANNELS))


def count_flops(net: nn.Module, images: Tensor) -> int:
    """Count the floating point operations of one forward pass in training.

    A multiplication and an addition are two. Convolutions and linear layers are counted by torch, normalization by
    `normalization_flops`; activations, pooling and additions of residuals are left out.
    """
    normalization = 0

    def add(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal normalization
        normalization += normalization_flops(module, inputs[0], output)

    handles = [module.register_forward_hook(add) for module in net.modules()]
    net.train()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(images)
    for handle in handles:
        handle.remove()
    # Nothing else that torch counts: a layer may take its statistics by products of batches of matrices.
    counts = counter.get_flop_counts().get("Global", {})
    return normalization + sum(
        counts.get(operation, 0) for operation in (torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm)
    )


def normalization_flops(module: nn.Module, input: Tensor, output: Tensor) -> int:
    """Count the operations of a layer's normalization, however it is computed; zero for other layers.

    Counted are the sums and sums of squares (three operations for each element they run over) and what is done to
    each element that is normalized: two, with an affine transformation four. KNConv normalizes its output: three.
    Left out are random numbers, and maps with a single channel.
    """
    if isinstance(module, AlgorithmOneConv2d):
        window = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
        return 3 * (output.numel() // module.out_channels) * window + 3 * output.numel()
    if isinstance(module, KNConv2d):
        return 3 * input.numel() + 3 * output.numel()
    if isinstance(module, KernelNorm2d):
        return 3 * input.numel() + 2 * output.numel()
    if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
        return 3 * input.numel() + 4 * output.numel()
    return 0
