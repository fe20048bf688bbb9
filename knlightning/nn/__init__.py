"""Layers in pure torch."""

from knlightning.nn.conv import KNConv1d, KNConv2d, KNConv3d
from knlightning.nn.functional import kernel_norm, kn_conv
from knlightning.nn.norm import KernelNorm1d, KernelNorm2d, KernelNorm3d

__all__ = [
    "KNConv1d",
    "KNConv2d",
    "KNConv3d",
    "KernelNorm1d",
    "KernelNorm2d",
    "KernelNorm3d",
    "kernel_norm",
    "kn_conv",
]
