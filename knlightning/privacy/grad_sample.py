"""Exact rules for Opacus: gradients of single samples ("hooks") and their norms ("ghost") for the layers of the models.

Importing this module registers them, in place of Opacus' own where it has some: those are taken in the precision of
autocast, know no norms of convolutions, and of linear layers on images give the norms of another pass. KNConv and the
blocks of ConvNeXt need more than Opacus' hooks tell a rule, which :func:`watch_statistics` notes down beside them:

    hooks = GradSampleHooks(network)
    handles = watch_statistics(network)
    ...
    for handle in handles:
        handle.remove()
    hooks.remove_hooks()
"""

from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from opacus.grad_sample import register_grad_sampler, register_norm_sampler
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchvision.models.convnext import CNBlock

from knlightning.nn.functional import Normalization, normalization_of
from knlightning.privacy.rules import AFFINE, LINEAR, KNConv, Parts, parts_of, watch_layer_scale

_seen: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
"""What was noted of each layer's passes, the last one last."""


def watch_statistics(model: nn.Module) -> list[RemovableHandle]:
    """Note how the KNConvs of a network normalize, and what passes the scales of ConvNeXt's blocks, for Opacus' rules.

    Only of passes whose gradients Opacus follows, those in training mode, and until their backward pass.

    Args:
        model: the network, before or after Opacus' hooks are attached.

    Returns:
        Handles by which to remove the hooks.
    """
    handles = []
    for layer in model.modules():
        if isinstance(layer, KNConv):
            _seen[layer] = []
            handles.append(layer.register_forward_hook(_note))
        elif isinstance(layer, CNBlock):
            _seen[layer] = []
            handles += watch_layer_scale(layer, _note_samples)
    return handles


def _note(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    if layer.training and torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters()):
        normalization = normalization_of(output)
        shown = output.detach() if normalization.relu_output else None
        _seen.setdefault(layer, []).append((normalization, shown))


def _note_samples(layer: nn.Module, samples: Tensor) -> None:
    _seen.setdefault(layer, []).append(samples)


def _recall(layer: nn.Module) -> Any:
    if not _seen.get(layer):
        raise RuntimeError(
            f"nothing was noted of the forward pass of {layer}: call "
            "knlightning.privacy.grad_sample.watch_statistics(network) when Opacus' hooks are attached"
        )
    return _seen[layer].pop()


def _parts(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> Parts:
    x = activations[0]
    normalization: Normalization | None = None
    if isinstance(layer, KNConv):
        normalization, output = _recall(layer)
        x = normalization.input
        if output is not None:
            backprops = torch.ops.aten.threshold_backward(backprops, output, 0)
    return parts_of(layer, x, backprops, normalization, [p for p in layer.parameters() if p.requires_grad])


@register_grad_sampler([*LINEAR, *AFFINE])
def grad_samples(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Compute the gradients of the samples [N, *shape] at each trainable parameter of a layer.

    Args:
        layer: the layer.
        activations: what it was given.
        backprops: gradient at its output, times N if the loss is a mean.
    """
    vectors, products = _parts(layer, activations, backprops)
    samples = vectors | {product.weight: product.samples() for product in products}
    return {parameter: gradient.to(parameter.dtype) for parameter, gradient in samples.items()}


@register_norm_sampler(LINEAR)
def norm_samples(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Compute the norms [N] of what :func:`grad_samples` does, without it where that is less work.

    Args:
        layer: the layer.
        activations: what it was given.
        backprops: gradient at its output, times N if the loss is a mean.
    """
    vectors, products = _parts(layer, activations, backprops)
    norms = {parameter: torch.linalg.vector_norm(samples.flatten(1), dim=1) for parameter, samples in vectors.items()}
    return norms | {product.weight: product.squared_norms().sqrt() for product in products}
