"""Kernel normalization of networks that were built with other normalizations."""

import copy
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import UnionType

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from knlightning.nn import KNConv1d, KNConv2d, KNConv3d, LocalContextNorm2d, PositionalNorm2d
from knlightning.nn.functional import EvalStatistics

KNConv = KNConv1d | KNConv2d | KNConv3d
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
TransposedConv = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
AnyConv = Conv | TransposedConv
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
InstanceNorm = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d
AnyNorm = BatchNorm | InstanceNorm | nn.GroupNorm | nn.LayerNorm | PositionalNorm2d | LocalContextNorm2d

_KN_CONVS: dict[type[Conv], type[KNConv]] = {nn.Conv1d: KNConv1d, nn.Conv2d: KNConv2d, nn.Conv3d: KNConv3d}
_ACTIVATIONS = {
    *("identity", "dropout", "dropout1d", "dropout2d", "dropout3d", "alphadropout", "featurealphadropout"),
    *("relu", "relu6", "leakyrelu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "swish", "mish"),
    *("hardswish", "hardsigmoid", "hardtanh", "sigmoid", "tanh", "softplus"),
}
"""What may stand between a normalization and a convolution: names in lower case without underscores."""


@dataclass(frozen=True)
class Report:
    """What has become of the convolutions and normalizations of a network; printed as a table.

    Args:
        convolutions: names of the convolutions that are kernel normalized now.
        norms: names of the normalizations that are gone.
        left: names of the convolutions and normalizations that are as they were, each with the reason.
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
    model: nn.Module, dropout_p: float = 0.05, eval_statistics: EvalStatistics = "clean"
) -> tuple[nn.Module, Report]:
    """Copy a network with its pairs of convolution and normalization replaced by kernel normalized convolutions.

    A pair is a convolution whose result goes to a normalization alone, or, in pre-activated networks, a normalization
    whose result goes to convolutions alone, through elementwise activations if any. The convolutions become KNConv
    with the same weight and a bias, under the same names in the state dict; the normalizations become identities, or,
    where they contain an activation as some of timm do, that activation. Convolutions without a normalization stay as
    they are. KNConv takes its statistics over all channels of the window, also where the convolution is depthwise or
    grouped. The result is another function than the given network, so it is to be trained.

    The flow of data is found by :mod:`torch.fx`, in training and in evaluation, with the defaults of optional
    arguments. Where a module cannot be traced, the pairs inside its children are found all the same, and what touches
    the rest is left and reported. Activations behind a removed normalization that comes before its convolution no
    longer work in place, for they would change the normalization's input. Layer normalizations over the channels are
    those with "2d" in the name of their class (torchvision, timm), those over several dimensions, and those behind a
    permutation that moves the channels last.

    Args:
        model: a network of convolutions, such as those of torchvision and timm; it is left untouched.
        dropout_p: dropout probability of the new layers in [0, 1).
        eval_statistics: evaluation statistics of the new layers, as in :class:`~knlightning.nn.KNConv2d`.

    Returns:
        The new network, and a report that names each convolution and each normalization.

    Raises:
        ValueError: if there is nothing to replace, or an argument is out of its range.
    """
    flow = _Flow(model)
    converted: set[str] = set()
    removed: set[str] = set()
    copying: set[str] = set()
    reasons: dict[str, str] = {}
    for name in flow.norms():
        before, after = flow.before(name), flow.after(name)
        if problem := _norm_obstacle(flow.layers[name]):
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
            new[module] = knconv_of(module, dropout_p, eval_statistics)
            report.convolutions.append(name)
        elif name in removed:
            new[module] = _activation_in(module)
            report.norms.append(name)
        elif name in flow.layers:
            report.left[name] = reasons.get(name) or _conv_obstacle(module) or flow.unpaired(name)
    if not new:
        raise ValueError(f"nothing in this {type(model).__name__} can be kernel normalized:\n{report}")
    for name, module in list(result.named_modules(remove_duplicate=False)):
        if module in new:
            result.set_submodule(name, new[module])
    return result, report


def knconv_of(conv: Conv, dropout_p: float, eval_statistics: EvalStatistics = "clean") -> KNConv:
    """Make a KNConv of the parameters of a convolution, with a bias of zeros if that has none.

    Raises:
        ValueError: if KNConv cannot express the convolution, or an argument is out of its range.
    """
    if problem := _conv_obstacle(conv):
        raise ValueError(f"{conv} cannot be kernel normalized: {problem}")
    with torch.device("meta"):  # the parameters are those of the convolution
        layer = _KN_CONVS[_torch_class(conv)](
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            _padding(conv),
            conv.groups,
            dropout_p=dropout_p,
            eval_statistics=eval_statistics,
        )
    layer.weight = conv.get_parameter("weight")
    if conv.bias is None:
        layer.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels), requires_grad=conv.weight.requires_grad)
    else:
        layer.bias = conv.get_parameter("bias")
    return layer.train(conv.training)


def _conv_obstacle(conv: nn.Module) -> str | None:
    """Say why a convolution cannot become a KNConv."""
    if isinstance(conv, TransposedConv):
        return "a transposed convolution has no kernel normalized form"
    if not isinstance(conv, Conv):
        return None
    base = _torch_class(conv)
    if type(conv).forward is not base.forward or type(conv)._conv_forward is not base._conv_forward:
        return f"{type(conv).__name__} computes something else than {base.__name__}"
    if any(d > 1 and k > 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)):
        return f"KNConv has no dilation, and its is {conv.dilation}"
    padding = _padding(conv)
    if conv.padding_mode != "zeros" and any(padding):
        return f"KNConv pads with zeros, and its padding mode is {conv.padding_mode}"
    if len(padding) > len(conv.kernel_size) and len(padding) != 4:
        return f"its padding is uneven: {conv.padding!r} for a kernel of {conv.kernel_size}"
    return _attachments(conv)


def _norm_obstacle(norm: nn.Module) -> str | None:
    """Say why a normalization cannot be removed, whatever is beside it."""
    if others := [name for name, _ in norm.named_children() if name not in ("drop", "act")]:
        return f"{type(norm).__name__} has layers of its own: {', '.join(others)}"
    if len(inspect.signature(type(norm).forward).parameters) > 2:  # besides self
        return f"{type(norm).__name__} takes more than one input"
    return _attachments(norm)


def _attachments(module: nn.Module) -> str | None:
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    if any(hooks) or parametrize.is_parametrized(module):
        return "it has hooks or parametrizations, which would be lost"
    return None


def _torch_class(conv: Conv) -> type[Conv]:
    return next(base for base in _KN_CONVS if isinstance(conv, base))


def _padding(conv: Conv) -> tuple[int, ...]:
    """Return the padding of each dimension; if it is uneven, before and after each, the last dimension first."""
    sizes = conv.kernel_size
    if conv.padding == "valid":
        return (0,) * len(sizes)
    if conv.padding == "same":
        if all(k % 2 for k in sizes):
            return tuple(k // 2 for k in sizes)
        return tuple(p for k in reversed(sizes) for p in ((k - 1) // 2, k // 2))
    assert not isinstance(conv.padding, str)  # torch knows no others
    return conv.padding


def _activation_in(norm: nn.Module) -> nn.Module:
    """Return what timm's layers of normalization and activation do after normalizing."""
    rest = OrderedDict(norm.named_children())
    return (nn.Sequential(rest) if rest else nn.Identity()).train(norm.training)


def _of_last_dimension(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm) and len(norm.normalized_shape) == 1 and "2d" not in type(norm).__name__


class _Tracer(fx.Tracer):
    """Traces down to convolutions, normalizations, activations and the layers of torch and of this package."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            isinstance(m, AnyConv | AnyNorm)
            or type(m).__module__.startswith("knlightning.nn.")
            or (_plain(type(m).__name__) in _ACTIVATIONS and not any(m.children()))
            or super().is_leaf_module(m, module_qualified_name)
        )


class _Flow:
    """Where the results of a network's convolutions and normalizations go.

    Layers go by their first name in the network. A layer may be called several times, and by each of two graphs, one
    of training and one of evaluation.
    """

    def __init__(self, model: nn.Module) -> None:
        model = copy.deepcopy(model)  # tracing runs the network's code, which may change the network
        self.names = {module: name for name, module in model.named_modules()}
        self.layers = {n: m for m, n in self.names.items() if isinstance(m, AnyConv | AnyNorm)}
        self.modules: dict[fx.Node, nn.Module] = {}
        self.calls: defaultdict[str, list[fx.Node]] = defaultdict(list)
        self.untraced: dict[str, str] = {}
        self._trace(model, "")

    def _trace(self, module: nn.Module, problem: str) -> None:
        """Note the calls in a module; if it cannot be traced, note why, and the calls in each of its children."""
        graphs = []
        tracer = _Tracer()
        if not isinstance(module, nn.ModuleList | nn.ModuleDict) and not tracer.is_leaf_module(module, ""):
            for training in (True, False):
                try:
                    graphs.append(tracer.trace(module.train(training), _defaults(module)))
                except Exception as error:  # anything that the network's code may raise on symbolic tensors
                    message = str(error).partition("\n")[0]
                    who = f"{type(module).__name__} {self.names[module]}".rstrip()
                    problem = f"{who} cannot be traced ({type(error).__name__}: {message})"
        for node in (node for graph in graphs for node in graph.nodes if node.op == "call_module"):
            self.modules[node] = module.get_submodule(str(node.target))
            self.calls[self.names[self.modules[node]]].append(node)
        if not graphs:
            self.untraced[self.names[module]] = problem
            for child in module.children():
                self._trace(child, problem)

    def norms(self) -> list[str]:
        """Names of the normalizations in the order of their calls."""
        return [name for name in self.calls if isinstance(self.layers.get(name), AnyNorm)]

    def before(self, norm: str) -> set[str] | str:
        """Names of the convolutions whose results go to a normalization alone, or why there are none."""
        convs = set()
        for call in self.calls[norm]:
            source, permuted = call.all_input_nodes[0], False
            while self._is_identity(source) or _moves_channels_last(source):
                permuted = permuted or _moves_channels_last(source)
                source = source.all_input_nodes[0]
            conv = self._layer(source, AnyConv)
            if conv is None:
                return f"its input comes from {self._label(source)}"
            if problem := _conv_obstacle(self.layers[conv]):
                return f"its input comes from {conv}: {problem}"
            if permuted != _of_last_dimension(self.layers[norm]):
                return "it does not normalize the channels"
            for conv_call in self.calls[conv]:
                _, ends = _follow(conv_call, lambda node: self._is_identity(node) or _moves_channels_last(node))
                if len(ends) != 1 or self._layer(ends[0], AnyNorm) is None:
                    return f"the result of {conv} goes to {' and '.join(map(self._label, ends))}"
            convs.add(conv)
        return convs

    def after(self, norm: str) -> set[str] | str:
        """Names of the convolutions to which alone the result of a normalization goes, or why there are none."""
        if _of_last_dimension(self.layers[norm]):
            return "it normalizes the last dimension"
        convs = set()
        for call in self.calls[norm]:
            passed, ends = _follow(call, self._is_activation)
            for end in ends:
                conv = self._layer(end, AnyConv)
                if conv is None:
                    return f"its result goes to {self._label(end)}"
                if problem := _conv_obstacle(self.layers[conv]):
                    return f"its result goes to {conv}: {problem}"
                for conv_call in self.calls[conv]:
                    source = conv_call.all_input_nodes[0]
                    while self._is_activation(source):
                        source = source.all_input_nodes[0]
                    if self._layer(source, AnyNorm) is None:
                        return f"its result goes to {conv}, and so does that of {self._label(source)}"
                convs.add(conv)
            for node in passed:
                if node.kwargs.get("inplace") or self._label(node).endswith("_"):
                    return f"its result is changed in place by the function {self._label(node)}"
        return convs or "its result goes nowhere"

    def activations(self, norm: str) -> list[str]:
        """Names of the layers between a normalization and the convolutions behind it."""
        passed = [node for call in self.calls[norm] for node in _follow(call, self._is_activation)[0]]
        return [self.names[self.modules[node]] for node in passed if node in self.modules]

    def unpaired(self, layer: str) -> str:
        """Say why a layer that could be replaced is in no pair."""
        if layer in self.calls:
            return "no normalization forms a pair with it"
        return self.untraced.get(layer, "it is not called")

    def _layer(self, node: fx.Node, kinds: UnionType) -> str | None:
        module = self.modules.get(node)
        return self.names[module] if isinstance(module, kinds) else None

    def _is_identity(self, node: fx.Node) -> bool:
        return isinstance(self.modules.get(node), nn.Identity)

    def _is_activation(self, node: fx.Node) -> bool:
        name = type(self.modules[node]).__name__ if node in self.modules else self._label(node)
        return node.op.startswith("call_") and _plain(name) in _ACTIVATIONS

    def _label(self, node: fx.Node) -> str:
        """Name what a node calls."""
        if node in self.modules:
            return self.names[self.modules[node]]
        if node.op in ("placeholder", "output"):
            return f"the {node.op.replace('placeholder', 'input')}"
        return getattr(node.target, "__name__", str(node.target))


def _plain(name: str) -> str:
    return name.lower().replace("_", "")


def _follow(node: fx.Node, passes: Callable[[fx.Node], bool]) -> tuple[list[fx.Node], list[fx.Node]]:
    """List the nodes that a result passes, and those where it ends."""
    passed, ends = [], []
    for user in node.users:
        if passes(user):
            further = _follow(user, passes)
            passed += [user, *further[0]]
            ends += further[1]
        else:
            ends.append(user)
    return passed, ends


def _moves_channels_last(node: fx.Node) -> bool:
    """Whether a node permutes [N, C, *spatial] to [N, *spatial, C]."""
    if getattr(node.target, "__name__", node.target) != "permute":
        return False
    dims = node.kwargs.get("dims", node.args[1:])
    if isinstance(dims, tuple) and len(dims) == 1:
        (dims,) = dims
    return isinstance(dims, list | tuple) and list(dims) == [0, *range(2, len(dims)), 1]


def _defaults(module: nn.Module) -> dict[str, bool | int | float | str | None]:
    """Return the optional arguments of a module's forward that are numbers, strings or None."""
    parameters = inspect.signature(inspect.unwrap(type(module).forward)).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, None | bool | int | float | str)}
