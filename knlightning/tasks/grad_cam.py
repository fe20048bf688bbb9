"""Where in an image a network sees the class that it predicts."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def grad_cam(network: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Compute how much the parts of images speak for a class, by the last maps of features of a network.

    Each map is weighted by the mean of the gradient of the class's logit; what is left of their sum above 0 is brought
    to the size of the images.

    Args:
        network: Network, from images (N, C, H, W) to logits (N, classes), in evaluation mode.
        images: The images.
        classes: Class of each (N,), int64.

    Returns:
        (N, H, W) in [0, 1]; the highest value of an image is 1, unless nothing speaks for the class.

    Raises:
        ValueError: If no layer of the network gives maps of features.

    Source: Selvaraju et al. (ICCV 2017).
    """
    last: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[-2:].numel() > 1:
            last[:] = [output]

    hooks = [module.register_forward_hook(keep) for module in network.modules()]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            logits = network(images.clone().requires_grad_())
            if not last:
                raise ValueError(f"{type(network).__name__} has no layer that gives maps of features")
            scores = logits.gather(1, classes.clone()[:, None]).sum()
            (gradient,) = torch.autograd.grad(scores, last[0])
    finally:
        for hook in hooks:
            hook.remove()
    maps = (gradient.mean(dim=(2, 3), keepdim=True) * last[0].detach()).sum(dim=1, keepdim=True).relu().float()
    maps = F.interpolate(maps, images.shape[-2:], mode="bilinear", align_corners=False)
    return (maps / maps.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12))[:, 0]


def highlighted(images: Tensor, maps: Tensor) -> Tensor:
    """Darken the parts of images (N, C, H, W) that say little, by what `grad_cam` returns."""
    return images * (0.2 + 0.8 * maps[:, None])
