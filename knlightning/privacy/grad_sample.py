"""Exact rules for Opacus: gradients of single samples ("hooks") and their norms ("ghost") for the layers of the models.

Opacus' own rules work in the precision of autocast, are wrong for convolutions of channels-last images, have no norms
of convolutions, and for linear layers on images give the norms of another pass. KNConv and the blocks of ConvNeXt need
more than Opacus' hooks tell a rule. `watch_statistics` notes it, and registers the rules. It is the one call that
Opacus needs before it is used as ever:

    watch_statistics(network)
    network, optimizer, loader = PrivacyEngine().make_private(module=network, ...)
"""

from functools import partial
from typing import Any, get_args
from weakref import WeakKeyDictionary

import torch
from opacus.grad_sample import register_grad_sampler, register_norm_sampler
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchvision.models.convnext import CNBlock

from knlightning.internals.opacus import passes_awaiting_gradients
from knlightning.nn.functional import Normalization, normalization_of
from knlightning.nn.statistics import statistics_dtype
from knlightning.privacy.rules import AFFINE, LINEAR, KNConv, LossReduction, Parts, parts_of

_seen: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
"""What was noted of each layer's passes, the last one last."""


def register_opacus_rules() -> None:
    """Let Opacus use the rules of this module, from now on and everywhere in this process.

    They take the place of Opacus' own for linear layers, convolutions and normalizations. Importing the package
    registers nothing: `watch_statistics` calls this, and `knlightning.privacy.DifferentialPrivacy` does
    without Opacus' rules. Call it before Opacus' hooks are attached to a network that has neither KNConv nor blocks of
    ConvNeXt, to have exact gradients there, too.
    """
    register_grad_sampler([*LINEAR, *AFFINE])(grad_samples)
    register_norm_sampler(LINEAR)(norm_samples)
    register_grad_sampler(CNBlock)(layer_scale_samples)


def watch_statistics(model: nn.Module, loss_reduction: LossReduction = "mean") -> list[RemovableHandle]:
    """Register the rules, and note for them how the KNConvs and the blocks of ConvNeXt compute.

    Only passes in training mode are noted, whose gradients Opacus follows, and until their backward pass.

    Args:
        model: The network. Call this before Opacus' hooks are attached; afterwards only if
            `register_opacus_rules` was called before.
        loss_reduction: That of Opacus' hooks.

    Returns:
        Handles by which to remove the hooks.
    """
    register_opacus_rules()
    handles = []
    for layer in model.modules():
        if type(layer) in get_args(KNConv):
            _seen[layer] = []
            handles.append(layer.register_forward_hook(_note))
        elif isinstance(layer, CNBlock):
            _seen[layer] = []
            handles += _watch_scale(layer, loss_reduction)
    return handles


def _note(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    if layer.training and torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters()):
        normalization = normalization_of(output)
        shown = output.detach() if normalization.relu_output else None
        _seen.setdefault(layer, []).append((normalization, shown))


def _watch_scale(block: CNBlock, loss_reduction: LossReduction) -> list[RemovableHandle]:
    """Note the gradients of the samples at the scale of a ConvNeXt block in each backward pass.

    The scale is a parameter of the block itself, between its layers and a stochastic depth. The gradient that comes
    from there is 0 for samples whose block was skipped.
    """
    unscaled: list[Tensor] = []
    return [
        block.block.register_forward_hook(partial(_keep, unscaled)),
        block.stochastic_depth.register_forward_pre_hook(partial(_follow, block, loss_reduction, unscaled)),
    ]


def _keep(unscaled: list[Tensor], layers: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    unscaled[:] = [output.detach()]


def _follow(
    block: CNBlock, loss_reduction: LossReduction, unscaled: list[Tensor], depth: nn.Module, args: tuple[Tensor, ...]
) -> None:
    if args[0].requires_grad and block.training:
        args[0].register_hook(partial(_note_scale, block, loss_reduction, [unscaled.pop()]))


def _note_scale(block: CNBlock, loss_reduction: LossReduction, unscaled: list[Tensor], grad: Tensor) -> None:
    x = unscaled.pop()  # the graph may live on
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        samples = (x.to(statistics_dtype(x)) * grad).sum((2, 3))[..., None, None]
    _seen.setdefault(block, []).append(samples * (len(samples) if loss_reduction == "mean" else 1))


def _recall(layer: nn.Module, passes: int) -> Any:
    """Take what was noted of a layer's last pass, if as much is there as passes await their gradient."""
    noted = _seen.get(layer, [])
    if len(noted) != passes:
        raise RuntimeError(
            f"{len(noted)} forward passes through {layer} were noted where {passes} await their gradient: call "
            "knlightning.privacy.watch_statistics(network) once, before Opacus' hooks are attached, and run a backward "
            "pass after each forward pass"
        )
    return noted.pop()


def _parts(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> Parts:
    x = activations[0]
    normalization: Normalization | None = None
    if isinstance(layer, KNConv):
        normalization, output = _recall(layer, passes_awaiting_gradients(layer) + 1)
        x = normalization.input
        if output is not None:
            backprops = torch.ops.aten.threshold_backward(backprops, output, 0)
    return parts_of(layer, x, backprops, normalization, [p for p in layer.parameters() if p.requires_grad])


def grad_samples(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Compute the gradients of the samples [N, *shape] at each trainable parameter of a layer.

    Args:
        layer: The layer.
        activations: What it was given.
        backprops: Gradient at its output, times N if the loss is a mean.
    """
    vectors, products = _parts(layer, activations, backprops)
    samples = vectors | {product.weight: product.samples() for product in products}
    return {parameter: gradient.to(parameter.dtype) for parameter, gradient in samples.items()}


def norm_samples(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Compute the norms [N] of what `grad_samples` does, without it where that is less work.

    Args:
        layer: The layer.
        activations: What it was given.
        backprops: Gradient at its output, times N if the loss is a mean.
    """
    vectors, products = _parts(layer, activations, backprops)
    norms = {parameter: torch.linalg.vector_norm(samples.flatten(1), dim=1) for parameter, samples in vectors.items()}
    return norms | {product.weight: product.squared_norms().sqrt() for product in products}


def layer_scale_samples(block: CNBlock, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Look up the gradients of the samples at the scale of a ConvNeXt block, which were noted when they passed.

    Args:
        block: The block.
        activations: What it was given.
        backprops: Gradient at its output, times N if the loss is a mean.
    """
    if not _seen.get(block):
        raise RuntimeError(
            "nothing was noted of the scale of a ConvNeXt block: call knlightning.privacy.watch_statistics(network) "
            "before Opacus' hooks are attached. Where all layers before the block are frozen, Opacus asks for it too "
            "early: use knlightning.privacy.PerSampleGradients there"
        )
    samples: Tensor = _seen[block].pop()
    return {block.layer_scale: samples.to(block.layer_scale.dtype)}
