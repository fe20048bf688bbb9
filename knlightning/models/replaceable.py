"""Which layers kernel normalization can replace, and the KNConv that takes the place of a convolution."""

import inspect

import torch
from torch import nn
from torch.nn.utils import parametrize

from knlightning.internals.torch import convolves_as, has_hooks
from knlightning.nn import KNConv1d, KNConv2d, KNConv3d
from knlightning.nn.functional import EvalStatistics

KNConv = KNConv1d | KNConv2d | KNConv3d
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
TransposedConv = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
AnyConv = Conv | TransposedConv

_KN_CONVS: dict[type[Conv], type[KNConv]] = {nn.Conv1d: KNConv1d, nn.Conv2d: KNConv2d, nn.Conv3d: KNConv3d}


def knconv_of(
    conv: Conv, *, dropout_p: float, eps: float = 1e-5, eval_statistics: EvalStatistics = "expected"
) -> KNConv:
    """Make a KNConv of the parameters of a convolution, with a bias of zeros if that has none.

    Args:
        conv: Convolution of torch, or of a subclass that computes the same.
        dropout_p: Dropout probability of the new layer in [0, 1).
        eps: Added to the variance.
        eval_statistics: Evaluation statistics of the new layer, as in `knlightning.nn.KNConv2d`.

    Returns:
        The new layer, with the very parameters of the convolution.

    Raises:
        ValueError: If KNConv cannot express the convolution, or an argument is out of its range.
    """
    if problem := conv_obstacle(conv):
        raise ValueError(f"{conv} cannot be kernel normalized: {problem}")
    with torch.device("meta"):  # the parameters are those of the convolution
        layer = _KN_CONVS[_torch_class(conv)](
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.groups,
            dropout_p=dropout_p,
            eps=eps,
            eval_statistics=eval_statistics,
            dilation=conv.dilation,
            padding_mode=conv.padding_mode,
        )
    layer.weight = conv.get_parameter("weight")
    if conv.bias is None:
        layer.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels), requires_grad=conv.weight.requires_grad)
    else:
        layer.bias = conv.get_parameter("bias")
    return layer.train(conv.training)


def conv_obstacle(conv: nn.Module) -> str | None:
    """Say why a convolution cannot become a KNConv."""
    if isinstance(conv, TransposedConv):
        return "a transposed convolution has no kernel normalized form"
    if not isinstance(conv, Conv):
        return None
    base = _torch_class(conv)
    if not convolves_as(conv, base):
        return f"{type(conv).__name__} computes something else than {base.__name__}"
    return _attachments(conv)


def norm_obstacle(norm: nn.Module) -> str | None:
    """Say why a normalization cannot be removed, whatever is beside it."""
    if others := [name for name, _ in norm.named_children() if name not in ("drop", "act")]:
        return f"{type(norm).__name__} has layers of its own: {', '.join(others)}"
    if len(inspect.signature(type(norm).forward).parameters) > 2:  # besides self
        return f"{type(norm).__name__} takes more than one input"
    return _attachments(norm)


def _attachments(module: nn.Module) -> str | None:
    if has_hooks(module) or parametrize.is_parametrized(module):
        return "it has hooks or parametrizations, which would be lost"
    return None


def _torch_class(conv: Conv) -> type[Conv]:
    return next(base for base in _KN_CONVS if isinstance(conv, base))
