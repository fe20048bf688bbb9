"""Kernel normalized convolutions in groups, each group of channels with statistics of its own."""

from functools import partial

from knlightning.nn.conv import KNConv1d, KNConv2d, KNConv3d
from knlightning.nn.functional import kn_conv

kn_conv_by_group = partial(kn_conv, by_group=True)
"""`knlightning.nn.kn_conv` of each group of channels by itself, with the results side by side."""


class GroupKNConv1d(KNConv1d):
    """Convolution of sequences in groups that are kernel normalized one by one; see `GroupKNConv2d`."""

    by_group = True


class GroupKNConv2d(KNConv2d):
    """Convolution of images in groups that are kernel normalized one by one.

    Each group of channels is normalized by the mean and variance of its own part of a window. `KNConv2d`, whose
    arguments it has, takes them over all channels.
    """

    by_group = True


class GroupKNConv3d(KNConv3d):
    """Convolution of volumes in groups that are kernel normalized one by one; see `GroupKNConv2d`."""

    by_group = True
