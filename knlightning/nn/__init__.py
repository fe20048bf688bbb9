"""Layers in pure torch."""

from knlightning.nn.activations import Activation, make_activation
from knlightning.nn.conv import KNConv1d, KNConv2d, KNConv3d
from knlightning.nn.conv_transpose import KNConvTranspose1d, KNConvTranspose2d, KNConvTranspose3d, kn_conv_transpose
from knlightning.nn.functional import kernel_norm, kn_conv
from knlightning.nn.fused import fused_kernels
from knlightning.nn.group_statistics import GroupKNConv1d, GroupKNConv2d, GroupKNConv3d, kn_conv_by_group
from knlightning.nn.local_context import LocalContextNorm2d, local_context_norm
from knlightning.nn.norm import KernelNorm1d, KernelNorm2d, KernelNorm3d
from knlightning.nn.normalization import Norm, make_norm
from knlightning.nn.positional import PositionalNorm2d, positional_norm
from knlightning.nn.standardized import StandardizedKNConv2d

__all__ = [
    "Activation",
    "GroupKNConv1d",
    "GroupKNConv2d",
    "GroupKNConv3d",
    "KNConv1d",
    "KNConv2d",
    "KNConv3d",
    "KNConvTranspose1d",
    "KNConvTranspose2d",
    "KNConvTranspose3d",
    "KernelNorm1d",
    "KernelNorm2d",
    "KernelNorm3d",
    "LocalContextNorm2d",
    "Norm",
    "PositionalNorm2d",
    "StandardizedKNConv2d",
    "fused_kernels",
    "kernel_norm",
    "kn_conv",
    "kn_conv_by_group",
    "kn_conv_transpose",
    "local_context_norm",
    "make_activation",
    "make_norm",
    "positional_norm",
]
