"""Exact rules for Opacus: gradients of single samples ("hooks") and their norms ("ghost") for the layers of the models.

Importing this module registers them, in place of Opacus' own where it has some: those work in the precision of
autocast, are wrong of convolutions of channels-last images, know no norms of convolutions, and of linear layers on
images give the norms of another pass. KNConv and the blocks of ConvNeXt need more than Opacus' hooks tell a rule, which
:func:`watch_statistics` notes down beside them:

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
from knlightning.privacy.rules import AFFINE, LINEAR, KNConv, LayerScale, LossReduction, Parts, parts_of

_seen: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
"""What was noted of each layer's passes, the last one last."""


def watch_statistics(model: nn.Module, loss_reduction: LossReduction = "mean") -> list[RemovableHandle]:
    """Note how the KNConvs of a network normalize, and what passes the scales of ConvNeXt's blocks, for Opacus' rules.

    Only of passes whose gradients Opacus follows, those in training mode, and until their backward pass.

    Args:
        model: the network, before or after Opacus' hooks are attached.
        loss_reduction: that of Opacus' hooks.

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
            handles += LayerScale(layer, partial(_note_samples, loss_reduction)).watch()
    return handles


def _note(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    if layer.training and torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters()):
        normalization = normalization_of(output)
        shown = output.detach() if normalization.relu_output else None
        _seen.setdefault(layer, []).append((normalization, shown))


def _note_samples(loss_reduction: LossReduction, layer: nn.Module, samples: Tensor) -> None:
    if layer.training:
        _seen.setdefault(layer, []).append(samples * (len(samples) if loss_reduction == "mean" else 1))


def _recall(layer: nn.Module, passes: int) -> Any:
    """Take what was noted of a layer's last pass, if as much is there as passes await their gradient."""
    noted = _seen.get(layer, [])
    if len(noted) != passes:
        raise RuntimeError(
            f"{len(noted)} forward passes through {layer} were noted where {passes} await their gradient: call "
            "knlightning.privacy.watch_statistics(network) once, when Opacus' hooks are attached, and let a backward "
            "pass follow each forward pass"
        )
    return noted.pop()


def _parts(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> Parts:
    x = activations[0]
    normalization: Normalization | None = None
    if isinstance(layer, KNConv):
        awaiting: Any = layer.activations  # Opacus' list, from which it has taken this pass
        normalization, output = _recall(layer, len(awaiting) + 1)
        x = normalization.input
        if output is not None:
            backprops = torch.ops.aten.threshold_backward(backprops, output, 0)
    return parts_of(layer, x, backprops, normalization, [p for p in layer.parameters() if p.requires_grad])


@register_grad_sampler([*LINEAR, *AFFINE])  # type: ignore[untyped-decorator]
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


@register_norm_sampler(LINEAR)  # type: ignore[untyped-decorator]
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


@register_grad_sampler(CNBlock)  # type: ignore[untyped-decorator]
def layer_scale_samples(block: CNBlock, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Look up the gradients of the samples at the scale of a ConvNeXt block, which were noted when they passed.

    Args:
        block: the block.
        activations: what it was given.
        backprops: gradient at its output, times N if the loss is a mean.
    """
    if not _seen.get(block):
        raise RuntimeError(
            "nothing was noted of the scale of a ConvNeXt block: call knlightning.privacy.watch_statistics(network) "
            "when Opacus' hooks are attached; and Opacus asks for it too early where all layers before the block are "
            "frozen, which knlightning.privacy.PerSampleGradients does not"
        )
    samples: Tensor = _seen[block].pop()
    return {block.layer_scale: samples.to(block.layer_scale.dtype)}
