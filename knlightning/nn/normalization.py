"""Every normalization by name, with the settings of the paper's experiments."""

from typing import Literal, get_args

from torch import nn

from knlightning.nn.local_context import LocalContextNorm2d
from knlightning.nn.norm import KernelNorm2d
from knlightning.nn.positional import PositionalNorm2d

Norm = Literal["batch", "sync_batch", "layer", "group", "instance", "positional", "local_context", "kernel", "none"]

GROUPS = 32
"""Groups of group normalization (Wu and He, ECCV 2018)."""


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """Make a normalization of images [N, channels, H, W].

    All but "kernel" and "none" have a weight and a bias for each channel. Source of the settings: Nasirigerdeh et al.
    (TMLR 2024), section 4.

    Args:
        norm: "batch"; "sync_batch", over the batches of all devices, which must be GPUs if there are several; "layer",
            over all of an image, i.e. with one group; "group", with 32 groups; "instance"; "positional", over the
            channels of a position; "local_context", with 2 groups and windows of 227x227; "kernel", over dropped out
            positions, for there is no convolution here whose windows it could share; "none".
        channels: channels of the images.

    Raises:
        ValueError: if there is no normalization of that name, or its groups do not divide the channels.
    """
    match norm:
        case "batch":
            return nn.BatchNorm2d(channels)
        case "sync_batch":
            return nn.SyncBatchNorm(channels)
        case "layer":
            return nn.GroupNorm(1, channels)
        case "group":
            if channels % GROUPS:
                raise ValueError(
                    f'norm="group" normalizes in {GROUPS} groups and needs a multiple of {GROUPS} channels, got '
                    f'{channels} channels; "layer" and "instance" take any number'
                )
            return nn.GroupNorm(GROUPS, channels)
        case "instance":
            return nn.InstanceNorm2d(channels, affine=True)
        case "positional":
            return PositionalNorm2d(channels)
        case "local_context":
            return LocalContextNorm2d(channels)
        case "kernel":
            return KernelNorm2d(1)
        case "none":
            return nn.Identity()
    raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, got {norm!r}")
