"""Convert forty networks of torchvision and timm, train each for a step, and say what became of it.

    python experiments/convert_networks.py > docs/guides/converted_networks.md

Weights are random, nothing is downloaded. A network passes if the gradients of a step are finite, and if no sample has
a part in the result of another: the gradient of the first result at the second image is exactly 0.
"""

from collections import Counter
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from knlightning.commands.command import command
from knlightning.models import is_batch_independent, kernel_normalize
from knlightning.models.kernel_normalize import Report

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


def make(package: str, name: str, num_classes: int) -> tuple[nn.Module, tuple[int, ...]]:
    """Make a network, and return it with the shape of an image that it takes."""
    if package == "timm":
        net = timm.create_model(name, num_classes=num_classes)
        fixed = net.default_cfg.get("fixed_input_size", False) or name.startswith(("maxvit", "inception"))
        return net, net.default_cfg["input_size"] if fixed else (3, 64, 64)
    models: dict[str, Any] = {"weights": None, "num_classes": num_classes}
    if "lraspp" in name:
        models["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        models |= {"aux_logits": False, "init_weights": False}
    net = torchvision.models.get_model(name, **models)
    sizes = {"r3d_18": (3, 4, 32, 32), "vit_b_16": (3, 224, 224), "inception_v3": (3, 96, 96)}
    return net, sizes.get(name, (3, 64, 64))


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


def reasons(net: nn.Module, report: Report) -> str:
    """Say how many layers are left, and the most frequent reasons."""
    kinds = Counter(type(net.get_submodule(name)).__name__ for name in report.left)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def convert_networks(only: list[str] | None = None, reports: bool = False) -> dict[str, Report | None]:
    """Print the table.

    Args:
        only: Names of networks; null for all.
        reports: Whether to print all of each report, too.

    Returns:
        The reports by the names of the networks.
    """
    torch.manual_seed(0)
    found: dict[str, Report | None] = {}
    for package, names in (("torchvision", TORCHVISION), ("timm", TIMM)):
        for name in names:
            if only and name not in only:
                continue
            net, shape = make(package, name, num_classes=10)
            try:
                network, report = kernel_normalize(net)
            except ValueError as error:
                found[name] = None
                print(f"| {package}/{name} | - | {str(error)[:2000]}", flush=True)
                continue
            found[name] = report
            independent = train_step(network, shape)
            assert independent == is_batch_independent(network), name
            print(f"| {package}/{name} | {report.summary} {independent} {reasons(network, report)}", flush=True)
            if reports:
                print(report)
    return found


if __name__ == "__main__":
    command(convert_networks, "python experiments/convert_networks.py")
