"""Every normalization by name, with the settings of the paper's experiments.

A new normalization takes two files: its layer, and its row in the table `NORMS`. From the table follow the names
that networks take, what private training allows, the weight decay of norms, and what
`knlightning.models.kernel_normalize` replaces.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from torch import nn

from knlightning.checks import check, check_choice
from knlightning.nn.local_context import LocalContextNorm2d
from knlightning.nn.positional import PositionalNorm2d

GROUPS = 32
"""Groups of group normalization (Wu and He, ECCV 2018)."""


@dataclass(frozen=True)
class NormSpec:
    """A normalization of images [N, C, H, W], as a row of the table.

    Args:
        name: Its name in configurations.
        description: One sentence for the documentation.
        make: Makes the layer from the number of channels and the number that is added to the variance; None if
            convolutions normalize, and there is no layer beside them.
        types: Types of layers that normalize so: what `make` returns, and the same of torch, also for sequences and
            volumes.
        private: Whether each sample is normalized by itself, and no statistics are kept, as private training needs.
        affine: Whether the layer has a weight and a bias for each channel, by these names.
    """

    name: str
    description: str
    make: Callable[[int, float], nn.Module] | None
    types: tuple[type[nn.Module], ...] = ()
    private: bool = True
    affine: bool = True


def _group_norm(channels: int, eps: float) -> nn.Module:
    hint = 'The norms "layer" and "instance" take any number'
    check(channels % GROUPS == 0, "channels", channels, f'a multiple of {GROUPS} for norm="group"', hint)
    return nn.GroupNorm(GROUPS, channels, eps)


NORMS = {
    spec.name: spec
    for spec in (
        NormSpec(
            "batch",
            "Over the batch and all positions of a channel; running statistics in evaluation.",
            nn.BatchNorm2d,
            (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
            private=False,
        ),
        NormSpec(
            "sync_batch",
            "As `batch`, over the batches of all devices together; these must be GPUs if there are several.",
            nn.SyncBatchNorm,
            (nn.SyncBatchNorm,),
            private=False,
        ),
        NormSpec(
            "layer",
            "Over all channels and positions of an image: group normalization with one group.",
            lambda channels, eps: nn.GroupNorm(1, channels, eps),
            (nn.GroupNorm, nn.LayerNorm),
        ),
        NormSpec(
            "group", f"Over {GROUPS} groups of channels, at all positions of an image.", _group_norm, (nn.GroupNorm,)
        ),
        NormSpec(
            "instance",
            "Over all positions of a channel of an image.",
            lambda channels, eps: nn.InstanceNorm2d(channels, eps, affine=True),
            (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        ),
        NormSpec("positional", "Over all channels of a position.", PositionalNorm2d, (PositionalNorm2d,)),
        NormSpec(
            "local_context",
            "Over 2 groups of channels, in a window of 227x227 around each position.",
            lambda channels, eps: LocalContextNorm2d(channels, eps=eps),
            (LocalContextNorm2d,),
        ),
        NormSpec(
            "kernel",
            "Over all channels of a convolution's window, in the convolution itself: KNConv.",
            None,
            affine=False,
        ),
        NormSpec("none", "No normalization.", lambda channels, eps: nn.Identity(), affine=False),
    )
}
"""All normalizations by name. Source of the settings: Nasirigerdeh et al. (TMLR 2024), section 4."""

if TYPE_CHECKING:
    Norm: TypeAlias = str
else:
    Norm = Literal[tuple(NORMS)]  # the command line reads the choices from it

NORM_TYPES: tuple[type[nn.Module], ...] = tuple(dict.fromkeys(t for spec in NORMS.values() for t in spec.types))
"""Types of all normalization layers."""

_MIXING_TYPES = tuple(kind for spec in NORMS.values() if not spec.private for kind in spec.types)

PRIVATE_NORMS = tuple(spec.name for spec in NORMS.values() if spec.private)
"""Names of the normalizations that private training allows."""


def make_norm(norm: Norm, channels: int, eps: float = 1e-5) -> nn.Module:
    """Make a normalization of images [N, channels, H, W], by its name in `NORMS`.

    Args:
        norm: Any name but "kernel", which normalizes in the convolutions: these are
            `knlightning.nn.KNConv2d`.
        channels: Channels of the images.
        eps: Added to the variance.

    Returns:
        The layer; all but that of "none" have a weight and a bias for each channel.

    Raises:
        ArgumentError: If there is no such layer, or its groups do not divide the channels.
    """
    makers = {name: spec.make for name, spec in NORMS.items() if spec.make is not None}
    hint = "A kernel normalized network has KNConv2d in place of its convolutions, and no layers beside them"
    check_choice("norm", norm, tuple(makers), hint if norm in NORMS else "")
    return makers[norm](channels, eps)


def mixes_samples(layer: nn.Module) -> bool:
    """Say whether a layer normalizes over the samples of a batch, or keeps statistics of them.

    Args:
        layer: Known are the types in `NORMS`, and layers with running statistics, unless "Frozen" is in their name.
    """
    running = any(name.startswith("running_") for name, _ in layer.named_buffers(recurse=False))
    frozen = "Frozen" in type(layer).__name__
    return isinstance(layer, _MIXING_TYPES) or getattr(layer, "track_running_stats", False) or (running and not frozen)
