"""Kernel normalization of networks that were built with other normalizations."""

import copy
from collections import OrderedDict
from dataclasses import dataclass, field

from torch import nn

from knlightning.models.flow import Flow
from knlightning.models.replaceable import Conv, conv_obstacle, knconv_of, norm_obstacle
from knlightning.nn.functional import EvalStatistics


@dataclass(frozen=True)
class Report:
    """What has become of the convolutions and normalizations of a network; printed as a table.

    Args:
        convolutions: Names of the convolutions that are kernel normalized now.
        norms: Names of the normalizations that are removed.
        left: Names of the convolutions and normalizations that are unchanged, each with the reason.
    """

    convolutions: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [(name, "convolution, kernel normalized now") for name in self.convolutions]
        rows += [(name, "normalization, removed") for name in self.norms]
        rows += [(name, f"left: {reason}") for name, reason in self.left.items()]
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join(f"{name:{width}}  {outcome}" for name, outcome in rows)


def kernel_normalize(
    model: nn.Module, dropout_p: float = 0.05, eval_statistics: EvalStatistics = "expected", eps: float = 1e-5
) -> tuple[nn.Module, Report]:
    """Copy a network with its pairs of convolution and normalization replaced by kernel normalized convolutions.

    A pair is a convolution whose result goes to a normalization alone, or, in pre-activated networks, a normalization
    whose result goes to convolutions alone, through elementwise activations if any. The convolutions become KNConv
    with the same weight and a bias, under the same names in the state dict; the normalizations become identities, or,
    where they contain an activation as some of timm do, that activation. Convolutions without a normalization stay as
    they are. KNConv takes its statistics over all channels of the window, also where the convolution is depthwise or
    grouped. The new network computes another function than the given one, so it must be trained.

    The flow of data is found by `torch.fx`, in training and in evaluation, with the defaults of optional
    arguments. If a module cannot be traced, the pairs inside its children are still found, and the layers between them
    are left and reported. Where a removed normalization came before its convolution, the activations behind it no
    longer work in place, because they would change the normalization's input. Layer normalizations over the channels
    are those with "2d" in the name of their class (torchvision, timm), those over several dimensions, and those behind
    a permutation that moves the channels last.

    Args:
        model: Network of convolutions, such as those of torchvision and timm; it is not changed.
        dropout_p: Dropout probability of the new layers in [0, 1).
        eval_statistics: Evaluation statistics of the new layers, as in `knlightning.nn.KNConv2d`.
        eps: Added to the variance in the new layers.

    Returns:
        The new network, and a report that names each convolution and each normalization.

    Raises:
        ValueError: If there is nothing to replace, or an argument is out of its range.
    """
    flow = Flow(model)
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
            copying.update((name, *flow.activations(name)))
        elif not isinstance(before, str):
            removed.add(name)  # its convolution has one more in front
        else:
            reasons[name] = f"{before}; {after}"

    result = copy.deepcopy(model)
    for name in copying:
        for module in result.get_submodule(name).modules():
            if hasattr(module, "inplace"):
                module.inplace = False  # type: ignore[assignment] # a bool
    report = Report()
    new: dict[nn.Module, nn.Module] = {}
    for name, module in result.named_modules():
        if name in converted and isinstance(module, Conv):
            new[module] = knconv_of(module, dropout_p=dropout_p, eps=eps, eval_statistics=eval_statistics)
            report.convolutions.append(name)
        elif name in removed:
            new[module] = _activation_in(module)
            report.norms.append(name)
        elif name in flow.layers:
            report.left[name] = reasons.get(name) or conv_obstacle(module) or flow.unpaired(name)
    if not new:
        raise ValueError(f"nothing in this {type(model).__name__} can be kernel normalized:\n{report}")
    for name, module in list(result.named_modules(remove_duplicate=False)):
        if module in new:
            result.set_submodule(name, new[module])
    return result, report


def _activation_in(norm: nn.Module) -> nn.Module:
    """Return what timm's layers of normalization and activation do after normalizing."""
    rest = OrderedDict(norm.named_children())
    return (nn.Sequential(rest) if rest else nn.Identity()).train(norm.training)
