"""Kernel normalization of networks that were built with other normalizations."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, get_args

from torch import nn

from knlightning.checks import check_choice
from knlightning.models.calibrated import calibrate as fit_to_original
from knlightning.models.flow import Flow
from knlightning.models.replaceable import (
    AnyConv,
    Conv,
    GroupStatistics,
    Rest,
    activation_in,
    knconv_of,
    norm_obstacle,
    without_batch,
)
from knlightning.nn.activations import OtherReLU
from knlightning.nn.functional import EvalStatistics
from knlightning.nn.normalization import mixes_samples


@dataclass(frozen=True)
class Report:
    """What has become of the convolutions and normalizations of a network; printed as a line of summary and a table.

    Args:
        convolutions: Names of the convolutions that are kernel normalized now.
        norms: Names of the normalizations that are removed.
        left: Names of the layers that are unchanged, each with the reason: convolutions, normalizations, and others
            that mix the samples of a batch.
        replaced: Names of the normalizations that no convolution follows, each with what stands in its place.
        mixing: Names of the layers that mix the samples of a batch still.
    """

    convolutions: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    mixing: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """The counts, and whether the samples of a batch are independent of each other, in a line."""
        mixed = f"mixed by {', '.join(self.mixing[:3])}{' and others' if len(self.mixing) > 3 else ''}"
        return (
            f"Kernel normalized: {len(self.convolutions)} convolutions. Normalizations: {len(self.norms)} removed, "
            f"{len(self.replaced)} replaced. Layers left: {len(self.left)}. "
            f"Samples of a batch: {mixed if self.mixing else 'independent'}."
        )

    def __str__(self) -> str:
        rows = [(name, "convolution, kernel normalized now") for name in self.convolutions]
        rows += [(name, "normalization, removed") for name in self.norms]
        rows += [(name, f"normalization, replaced by {new}") for name, new in self.replaced.items()]
        rows += [(name, f"left: {reason}") for name, reason in self.left.items()]
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join([self.summary, *(f"{name:{width}}  {outcome}" for name, outcome in rows)])


def kernel_normalize(
    model: nn.Module,
    dropout_p: float = 0.05,
    eval_statistics: EvalStatistics = "expected",
    eps: float = 1e-5,
    rest: Rest = "kernel",
    group_statistics: GroupStatistics = "all",
    calibrate: Iterable[Any] | None = None,
) -> tuple[nn.Module, Report]:
    """Copy a network with its pairs of convolution and normalization replaced by kernel normalized convolutions.

    A pair is a convolution whose result goes to a normalization alone, or, in pre-activated networks, a normalization
    whose result goes to convolutions alone, through elementwise activations if any. The convolutions become KNConv
    with the same weight and a bias, under the same names in the state dict; the normalizations become identities, or,
    where they contain an activation as some of timm do, that activation. Transposed convolutions become
    `knlightning.nn.KNConvTranspose2d`. Convolutions without a normalization stay as they are. The new network computes
    another function than the given one, so it must be trained.

    Normalizations over the batch that are in no pair, such as the last one of pre-activated networks, become what
    `rest` says. Other normalizations without a pair stay, such as the layer normalizations of transformers.

    The flow of data is found by `torch.fx`, in training and in evaluation, with the defaults of optional arguments. A
    ReLU behind a new layer becomes a part of it (`relu_output`), and an identity takes its place. If a module cannot be
    traced, the pairs inside its children are still found, and the layers between them are left and reported; then ReLUs
    stay as they are. Where a removed normalization came before its convolution, the activations behind it no longer
    work in place if that would change what others read. Layer normalizations over the channels are those with "2d" in
    the name of their class (torchvision, timm), those over several dimensions, and those behind a permutation that
    moves the channels last.

    Args:
        model: Network of convolutions, such as those of torchvision and timm; it is not changed.
        dropout_p: Dropout probability of the new layers in [0, 1).
        eval_statistics: Evaluation statistics of the new layers, as in `knlightning.nn.KNConv2d`.
        eps: Added to the variance in the new layers.
        rest: What batch normalization in no pair becomes: "kernel", a KernelNorm of each pixel, with five times the
            dropout but at most 0.25, as before the classifier of the paper's networks; "group" (at most 32 groups, of
            two channels or more) or "layer", with its weight and bias; "keep" leaves it.
        group_statistics: Which channels of a window the statistics of depthwise and grouped convolutions are over:
            "all", or each group's "own" (`knlightning.nn.GroupKNConv2d`), if that has more than one element. On
            the digits "all" trains better; see the guide to networks.
        calibrate: A few batches of images as for evaluation, alone or first in a tuple, such as a loader gives them:
            `knlightning.models.calibrated.calibrate` fits the new layers to the pretrained ones on them. None leaves
            the weights as they are.

    Returns:
        The new network, and a report that names each convolution and each normalization.

    Raises:
        ValueError: If there is nothing to replace, or an argument is out of its range.
    """
    check_choice("rest", rest, get_args(Rest))
    check_choice("group_statistics", group_statistics, get_args(GroupStatistics))
    flow = Flow(model)
    converted, removed, copying, reasons = _pairs(flow)
    result = copy.deepcopy(model)
    for name in copying:
        for module in result.get_submodule(name).modules():
            if hasattr(module, "inplace"):
                module.inplace = False  # type: ignore[assignment] # a bool
    rectified, relus = flow.relus({name for name in converted if isinstance(flow.layers[name], Conv)}, removed)
    report = Report()
    new: dict[nn.Module, nn.Module] = {}
    settings: dict[str, Any] = {"dropout_p": dropout_p, "eps": eps, "eval_statistics": eval_statistics}
    for name, module in result.named_modules():
        if name in converted and isinstance(module, AnyConv):
            new[module] = knconv_of(
                module, **settings, group_statistics=group_statistics, relu_output=name in rectified
            )
            report.convolutions.append(name)
        elif name in relus and isinstance(module, nn.ReLU):
            new[module] = nn.Identity() if relus[name] else OtherReLU(module.inplace)
        elif name in removed:
            new[module] = activation_in(module)
            report.norms.append(name)
        elif rest != "keep" and mixes_samples(module) and (one := without_batch(module, rest, **settings)):
            new[module], report.replaced[name] = one
        elif name in flow.layers or mixes_samples(module):
            obstacle = None if isinstance(module, AnyConv) else norm_obstacle(module)
            report.left[name] = reasons.get(name) or obstacle or flow.unpaired(name)
            if mixes_samples(module):
                report.mixing.append(name)
    if not new:
        raise ValueError(f"nothing in this {type(model).__name__} can be kernel normalized:\n{report}")
    for name, module in list(result.named_modules(remove_duplicate=False)):
        if module in new:
            result.set_submodule(name, new[module])
    if calibrate is not None:
        fit_to_original(model, result, calibrate)
    return result, report


def _pairs(flow: Flow) -> tuple[set[str], set[str], set[str], dict[str, str]]:
    """Find the pairs of a network.

    Returns:
        Names of the convolutions, of the normalizations, of layers that may not change their input any more, and why
        other normalizations are in no pair.
    """
    converted: set[str] = set()
    removed: set[str] = set()
    copying: set[str] = set()
    reasons: dict[str, str] = {}
    for name in flow.norms():
        before, after = flow.before(name), flow.after(name)
        if problem := norm_obstacle(flow.layers[name]):
            reasons[name] = problem
        elif not isinstance(before, str) and not converted.issuperset(before):
            converted.update(before)
            removed.add(name)
        elif not isinstance(after, str):
            converted.update(after)
            removed.add(name)
            if not flow.is_fresh(name):
                copying.update((name, *flow.activations(name)))
        elif not isinstance(before, str):
            removed.add(name)  # its convolution has one more in front
        else:
            reasons[name] = f"{before}; {after}"
    return converted, removed, copying, reasons


def is_batch_independent(model: nn.Module) -> bool:
    """Say whether no layer of a network normalizes over the samples of a batch, or keeps statistics of them.

    Args:
        model: The network. Its layers are looked at, and not what its own code computes with a batch.
    """
    return not any(map(mixes_samples, model.modules()))
