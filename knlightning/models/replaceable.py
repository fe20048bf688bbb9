"""Which layers kernel normalization can replace, and what takes their place."""

import inspect
import math
from collections import OrderedDict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from knlightning.internals.torch import convolves_as, has_hooks
from knlightning.nn import (
    GroupKNConv1d,
    GroupKNConv2d,
    GroupKNConv3d,
    KernelNorm1d,
    KernelNorm2d,
    KernelNorm3d,
    KNConv1d,
    KNConv2d,
    KNConv3d,
    KNConvTranspose1d,
    KNConvTranspose2d,
    KNConvTranspose3d,
    StandardizedKNConv2d,
)
from knlightning.nn.functional import EvalStatistics
from knlightning.nn.normalization import GROUPS

KNConv = KNConv1d | KNConv2d | KNConv3d | KNConvTranspose1d | KNConvTranspose2d | KNConvTranspose3d
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
TransposedConv = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
AnyConv = Conv | TransposedConv
GroupStatistics = Literal["all", "own"]
Rest = Literal["kernel", "group", "layer", "keep"]

_KN_CONVS: dict[type[AnyConv], type[KNConv]] = {
    nn.Conv1d: KNConv1d,
    nn.Conv2d: KNConv2d,
    nn.Conv3d: KNConv3d,
    nn.ConvTranspose1d: KNConvTranspose1d,
    nn.ConvTranspose2d: KNConvTranspose2d,
    nn.ConvTranspose3d: KNConvTranspose3d,
}
_BY_GROUP: dict[type[AnyConv], type[KNConv]] = {
    nn.Conv1d: GroupKNConv1d,
    nn.Conv2d: GroupKNConv2d,
    nn.Conv3d: GroupKNConv3d,
}
_SAME = "timm.layers.conv2d_same.Conv2dSame"
"""A convolution whose padding follows from the size of its input; that of its attribute is none."""
_STANDARDIZED = "timm.layers.std_conv.StdConv2d"
"""A convolution with standardized filters; its padding may follow from its input if "Same" comes behind this name."""
_GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups", "dilation")
_BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
_InstanceNorm = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d  # with running statistics


def knconv_of(
    conv: AnyConv,
    *,
    dropout_p: float,
    eps: float = 1e-5,
    eval_statistics: EvalStatistics = "expected",
    group_statistics: GroupStatistics = "all",
    relu_output: bool = False,
) -> KNConv:
    """Make a KNConv of the parameters of a convolution, with a bias of zeros if that has none.

    Args:
        conv: Convolution of torch, or of a subclass that computes the same.
        dropout_p: Dropout probability of the new layer in [0, 1).
        eps: Added to the variance.
        eval_statistics: Evaluation statistics of the new layer, as in `knlightning.nn.KNConv2d`.
        group_statistics: As in `knlightning.models.kernel_normalize`.
        relu_output: Whether the new layer takes the ReLU of its output; not of a transposed convolution.

    Returns:
        The new layer, with the very parameters of the convolution.

    Raises:
        ValueError: If KNConv cannot express the convolution, or an argument is out of its range.
    """
    if problem := conv_obstacle(conv):
        raise ValueError(f"{conv} cannot be kernel normalized: {problem}")
    names = (*_GEOMETRY, "output_padding" if isinstance(conv, TransposedConv) else "padding_mode")
    geometry: dict[str, Any] = {name: getattr(conv, name) for name in names}
    if relu_output:
        geometry["relu_output"] = True
    by_group = group_statistics == "own" and conv.groups > 1 and conv.weight[0].numel() > 1
    kinds = _KN_CONVS | _BY_GROUP if by_group else _KN_CONVS
    kind = StandardizedKNConv2d if _is_standardized(conv) else kinds[_torch_class(conv)]
    with torch.device("meta"):  # the parameters are those of the convolution
        layer = kind(**geometry, dropout_p=dropout_p, eps=eps, eval_statistics=eval_statistics)
    if isinstance(layer, StandardizedKNConv2d):
        layer.filter_eps = conv.eps  # type: ignore[assignment] # a number
    layer.weight = conv.get_parameter("weight")
    if conv.bias is None:
        layer.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels), requires_grad=conv.weight.requires_grad)
    else:
        layer.bias = conv.get_parameter("bias")
    if _kind(conv) == _SAME or getattr(conv, "same_pad", False):
        layer.register_forward_pre_hook(pad_same)
    return layer.train(conv.training)


def pad_same(conv: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Pad the input of a convolution so that its output has a stride-th of its size, as TensorFlow and timm do.

    Args:
        conv: The convolution.
        args: Its arguments, the input [N, C, H, W] first.
    """
    pads: list[int] = []
    input, *others = args
    layer: Any = conv
    geometry = zip(input.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True)
    for n, k, s, d in reversed(list(geometry)):
        total = max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(input, pads), *others


def conv_obstacle(conv: nn.Module) -> str | None:
    """Say why a convolution cannot become a KNConv."""
    if not isinstance(conv, AnyConv):
        return None
    base = _torch_class(conv)
    if not (convolves_as(conv, base) or _kind(conv) == _SAME or _is_standardized(conv)):
        return f"{type(conv).__name__} computes something else than {base.__name__}"
    return _attachments(conv)


def norm_obstacle(norm: nn.Module) -> str | None:
    """Say why a normalization cannot be removed, whatever is beside it."""
    if others := [name for name, _ in norm.named_children() if name not in ("drop", "act")]:
        return f"{type(norm).__name__} has layers of its own: {', '.join(others)}"
    if len(inspect.signature(type(norm).forward).parameters) > 2:  # besides self
        return f"{type(norm).__name__} takes more than one input"
    return _attachments(norm)


class PixelNorm(KernelNorm1d):
    """KernelNorm of each pixel of an image, sequence or volume [N, C, *spatial], or of a vector [N, C]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(2) if input.dim() > 2 else input.unsqueeze(2)).view_as(input)


def without_batch(
    norm: nn.Module, rest: Rest, *, dropout_p: float, eps: float, eval_statistics: EvalStatistics
) -> tuple[nn.Module, str] | None:
    """Make what takes the place of a normalization over the batch that is in no pair.

    Args:
        norm: The normalization.
        rest: As in `knlightning.models.kernel_normalize`, as the arguments that follow; not "keep".
        dropout_p: Dropout probability of convolutions.
        eps: Added to the variance.
        eval_statistics: Evaluation statistics of KernelNorm.

    Returns:
        The new layer and a name for it; None if there is none, see `norm_obstacle`.
    """
    if norm_obstacle(norm) or not isinstance(norm, _BatchNorm | _InstanceNorm):
        return None
    channels = norm.num_features
    if rest == "kernel" and channels > 1:  # a pixel of a single channel would become 0
        flat = {nn.BatchNorm2d: KernelNorm2d, nn.BatchNorm3d: KernelNorm3d}
        kind = next((kind for base, kind in flat.items() if isinstance(norm, base)), PixelNorm)
        new: nn.Module = kind(1, dropout_p=min(5 * dropout_p, 0.25), eps=eps, eval_statistics=eval_statistics)
    else:
        groups = max(g for g in range(1, GROUPS + 1) if channels % g == 0 and (channels > g or g == 1))
        new = nn.GroupNorm(groups if rest == "group" else 1, channels, eps, norm.affine)
        if norm.affine:
            new.weight, new.bias = norm.get_parameter("weight"), norm.get_parameter("bias")
    rest_of_norm = OrderedDict(norm.named_children())
    whole = nn.Sequential(OrderedDict(norm=new) | rest_of_norm) if rest_of_norm else new
    return whole.train(norm.training), str(new)


def activation_in(norm: nn.Module) -> nn.Module:
    """Return what timm's layers of normalization and activation do after normalizing."""
    rest = OrderedDict(norm.named_children())
    return (nn.Sequential(rest) if rest else nn.Identity()).train(norm.training)


def _attachments(module: nn.Module) -> str | None:
    if has_hooks(module) or parametrize.is_parametrized(module):
        return "it has hooks or parametrizations, which would be lost"
    return None


def _is_standardized(conv: AnyConv) -> bool:
    return _kind(conv) in (_STANDARDIZED, f"{_STANDARDIZED}Same") and conv.groups == 1


def _kind(layer: nn.Module) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _torch_class(conv: AnyConv) -> type[AnyConv]:
    return next(base for base in _KN_CONVS if isinstance(conv, base))
