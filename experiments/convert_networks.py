"""Convert forty-five networks of torchvision and timm, train each for a step, and print what became of them.

    python experiments/convert_networks.py

Weights are random, nothing is downloaded. A network passes if the gradients of a step are finite, and if no sample has
a part in the result of another: the gradient of the first result at the second image is exactly 0.
"""

import re
from collections import Counter
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from knlightning.commands.command import command
from knlightning.models import is_batch_independent, kernel_normalize

TORCHVISION = (
    *("alexnet", "vgg11_bn", "googlenet", "inception_v3", "resnet18", "resnext50_32x4d", "densenet121"),
    *("mobilenet_v2", "mobilenet_v3_small", "mnasnet1_0", "shufflenet_v2_x1_0", "squeezenet1_1", "efficientnet_b0"),
    *("regnet_y_400mf", "convnext_tiny", "swin_t", "vit_b_16", "lraspp_mobilenet_v3_large", "r3d_18"),
)
TIMM = (
    *("resnet50", "resnetv2_50", "resnetv2_50x1_bit", "dpn68", "mobilenetv4_conv_small", "tf_efficientnet_b0"),
    *("rexnet_100", "hrnet_w18_small", "dla34", "res2net50_26w_4s", "skresnet18", "ecaresnet26t", "nf_resnet50"),
    *("convnextv2_atto", "mobilevit_s", "maxvit_tiny_rw_224", "levit_128s", "repvgg_a0", "ghostnet_100", "xception41"),
    *("ese_vovnet19b_dw", "cspdarknet53", "inception_v4", "fastvit_t8", "edgenext_xx_small", "resnetv2_50d_evos"),
)
SIZES = {"r3d_18": (3, 4, 32, 32), "vit_b_16": (3, 224, 224), "maxvit_tiny_rw_224": (3, 224, 224)}
SIZES |= {"levit_128s": (3, 224, 224), "inception_v3": (3, 96, 96), "inception_v4": (3, 96, 96)}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
    "lraspp_mobilenet_v3_large": {"weights_backbone": None},
}


def make(package: str, name: str) -> nn.Module:
    """Make a network with random weights."""
    if package == "timm":
        net: nn.Module = timm.create_model(name, num_classes=10)
    else:
        net = torchvision.models.get_model(name, weights=None, num_classes=10, **ARGUMENTS.get(name, {}))
    return net


def train_step(net: nn.Module, shape: tuple[int, ...]) -> bool:
    """Take gradients of a step with two images; return whether the samples are independent.

    Raises:
        ArithmeticError: If a gradient is not finite.
    """
    images = torch.rand(2, *shape, requires_grad=True)
    output = net.train()(images)
    output = output["out"] if isinstance(output, dict) else output
    (of_the_first,) = torch.autograd.grad(output[0].square().sum(), images, retain_graph=True)
    output.square().sum().backward()
    if not all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None):
        raise ArithmeticError("a gradient is not finite")
    return not of_the_first[1].any()


def describe(net: nn.Module, left: dict[str, str]) -> str:
    """Say what is left, by the types of layers, and why."""
    kinds: Counter[tuple[str, str]] = Counter()
    for name, reason in left.items():
        kind = type(net.get_submodule(name)).__name__
        known = {
            f"{kind} computes": "computes something else than a convolution",
            "traced": "not traced",
        }
        kinds[kind, next((text for part, text in known.items() if part in reason), "no pair")] += 1
    return "; ".join(f"{count} {kind} ({why})" for (kind, why), count in kinds.items())


def convert_networks(only: list[str] | None = None) -> None:
    """Print a table in Markdown.

    Args:
        only: Names of networks; null for all.

    Raises:
        ArithmeticError: If a gradient is not finite, or samples are mixed although the report says that they are not.
    """
    torch.manual_seed(0)
    print("| network | | convolutions | normalizations removed | replaced | layers left |")
    print("| --- | --- | --- | --- | --- | --- |")
    for package, names in (("torchvision", TORCHVISION), ("timm", TIMM)):
        for name in names:
            if only and name not in only:
                continue
            net = make(package, name)
            convs = sum(isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) for module in net.modules())
            try:
                network, report = kernel_normalize(net)
            except ValueError as error:
                left = dict(re.findall(r"^(\S+) +left: (.*)$", str(error), re.M))
                print(f"| {package}/{name} | no | 0 of {convs} | | | {describe(net, left)} |", flush=True)
                continue
            independent = train_step(network, SIZES.get(name, (3, 64, 64)))
            if independent is not is_batch_independent(network):
                raise ArithmeticError(f"{name}: samples are {'not ' * (not independent)}independent")
            done = "in part" if report.mixing or any("computes" in reason for reason in report.left.values()) else "yes"
            cells = [done, f"{len(report.convolutions)} of {convs}", len(report.norms), len(report.replaced) or ""]
            print(f"| {package}/{name} | {' | '.join(map(str, cells))} | {describe(net, report.left)} |", flush=True)


if __name__ == "__main__":
    command(convert_networks, "python experiments/convert_networks.py")
