"""Count the bytes that the operations around convolutions read and write in a training step.

    python experiments/traffic.py

Nothing is computed, so that no GPU is needed. Each operation is taken to read each of its tensors once and to write its
result once, as the fused kernels do; batch normalization in fact reads its input twice. Convolutions are left out.
"""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from knlightning.analysis.variants import AlgorithmOneConv2d, compute_as_published
from knlightning.checks import check_number
from knlightning.commands.command import command
from knlightning.models import knresnet50
from knlightning.nn import KNConv2d, fused_kernels, fused_passes, triton_kernels

CONVOLUTIONS = ("aten::convolution", "aten::convolution_backward", "aten::conv2d")


class Traffic(TorchDispatchMode):
    """Counts bytes of tensors, on the meta device, while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.name() not in CONVOLUTIONS and "empty" not in func.name():
            self.add((args, kwargs, result))
        return result

    def add(self, tensors: Any) -> None:
        """Add each tensor once; of one that is expanded only what is in memory."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self.bytes += min(tensor.nbytes, tensor.untyped_storage().nbytes())

    def launch(self, kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
        """Count a kernel in place of running it."""
        self.add(args)
        if kernel is triton_kernels.finish_gradient_kernel:
            self.add(args[0])  # written where it is read


def count_bytes(run: Callable[[], Tensor]) -> int:
    """Count the bytes of a forward and a backward pass."""
    with Traffic() as traffic, mock.patch.object(fused_passes, "_launch", traffic.launch):
        output = run()
        output.backward(torch.empty_like(output))
    return traffic.bytes


def layers() -> dict[str, nn.Module]:
    """Make the ways to convolve, normalize and take a ReLU that are compared."""
    geometry = (256, 256, 3, 1, 1)
    with torch.device("meta"):
        norms = {"BatchNorm and ReLU": nn.BatchNorm2d(256), "GroupNorm and ReLU": nn.GroupNorm(32, 256)}
        modules: dict[str, nn.Module] = {name: KNConv2d(*geometry) for name in ("KNConv, fused", "KNConv, plain")}
        modules |= {
            name: nn.Sequential(nn.Conv2d(*geometry, bias=False), norm, nn.ReLU()) for name, norm in norms.items()
        }
        modules["Algorithm 1 and ReLU"] = nn.Sequential(AlgorithmOneConv2d(*geometry), nn.ReLU())
    return modules


def traffic(batch_size: int = 32) -> dict[str, tuple[float, float]]:
    """Print a table of the bytes that a layer and a whole network move beside their convolutions.

    Args:
        batch_size: Images in a batch.

    Returns:
        For each way to normalize the tensors that a layer of 256 filters 3x3 on 56x56 moves, in units of its input, and
        the gigabytes of a training step at 224x224 of KNResNet-50 with that normalization.

    Raises:
        ArgumentError: If an argument is out of its range.
    """
    check_number("batch_size", batch_size, at_least=1, integer=True)
    results = {}
    print("| | layer, in tensors of the size of its input | KNResNet-50, in GB |\n| --- | --- | --- |")
    for name, layer in layers().items():
        x = torch.empty(batch_size, 256, 56, 56, device="meta")
        x.requires_grad_()
        images = torch.empty(batch_size, 3, 224, 224, device="meta")
        around = {"relu_output": True} if isinstance(layer, KNConv2d) else {}
        with torch.device("meta"):
            network = knresnet50(norm={"BatchNorm": "batch", "GroupNorm": "layer"}.get(name.split()[0], "kernel"))
        if name.startswith("Algorithm"):
            compute_as_published(network)
        with fused_kernels(name.endswith("fused")):
            tensors, total = (
                count_bytes(partial(layer, x, **around)) / x.nbytes,
                count_bytes(partial(network, images)) / 1e9,
            )
        results[name] = tensors, total
        print(f"| {name} | {tensors:.1f} | {total:.1f} |", flush=True)
    return results


if __name__ == "__main__":
    command(traffic, "python experiments/traffic.py")
