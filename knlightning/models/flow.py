"""Where the results of a network's convolutions and normalizations go, found by `torch.fx`."""

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable
from types import UnionType

import torch
from torch import fx, nn

from knlightning.internals.torch import has_hooks
from knlightning.models.replaceable import AnyConv, conv_obstacle
from knlightning.nn.normalization import NORM_TYPES

_ACTIVATIONS = {
    *("identity", "dropout", "dropout1d", "dropout2d", "dropout3d", "alphadropout", "featurealphadropout"),
    *("relu", "relu6", "leakyrelu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "swish", "mish"),
    *("hardswish", "hardsigmoid", "hardtanh", "sigmoid", "tanh", "softplus"),
}
"""What may stand between a normalization and a convolution: names in lower case without underscores."""


def of_last_dimension(norm: nn.Module) -> bool:
    """Say whether a normalization is of the last dimension, and not of channels that come second."""
    return isinstance(norm, nn.LayerNorm) and len(norm.normalized_shape) == 1 and "2d" not in type(norm).__name__


def _pairs(module: nn.Module) -> bool:
    """Whether a module can be part of a pair."""
    return isinstance(module, (AnyConv, *NORM_TYPES))


class _Tracer(fx.Tracer):
    """Traces down to convolutions, normalizations, activations and the layers of torch and of this package."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            _pairs(m)
            or type(m).__module__.startswith("knlightning.nn.")
            or (_plain(type(m).__name__) in _ACTIVATIONS and not any(m.children()))
            or type(m).__name__.endswith("2dSame")  # of timm, which pads by the size of what it is given
            or super().is_leaf_module(m, module_qualified_name)
        )


class Flow:
    """Where the results of a network's convolutions and normalizations go.

    Layers go by their first name in the network. A layer may be called several times, and by each of two graphs, one
    of training and one of evaluation.
    """

    def __init__(self, model: nn.Module) -> None:
        model = copy.deepcopy(model)  # tracing runs the network's code, which may change the network
        self.names = {module: name for name, module in model.named_modules()}
        self.layers = {name: module for module, name in self.names.items() if _pairs(module)}
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
        return [name for name in self.calls if isinstance(self.layers.get(name), NORM_TYPES)]

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
            if problem := self._conv_obstacle(conv):
                return f"its input comes from {conv}: {problem}"
            if permuted != of_last_dimension(self.layers[norm]):
                return "it does not normalize the channels"
            for conv_call in self.calls[conv]:
                _, ends = _follow(conv_call, lambda node: self._is_identity(node) or _moves_channels_last(node))
                if len(ends) != 1 or self._layer(ends[0], NORM_TYPES) is None:
                    return f"the result of {conv} goes to {' and '.join(map(self._label, ends))}"
            convs.add(conv)
        return convs

    def after(self, norm: str) -> set[str] | str:
        """Names of the convolutions to which alone the result of a normalization goes, or why there are none."""
        if of_last_dimension(self.layers[norm]):
            return "it normalizes the last dimension"
        convs = set()
        for call in self.calls[norm]:
            passed, ends = _follow(call, self._is_activation)
            for end in ends:
                conv = self._layer(end, AnyConv)
                if conv is None:
                    return f"its result goes to {self._label(end)}"
                if problem := self._conv_obstacle(conv):
                    return f"its result goes to {conv}: {problem}"
                for conv_call in self.calls[conv]:
                    source = conv_call.all_input_nodes[0]
                    while self._is_activation(source):
                        source = source.all_input_nodes[0]
                    if self._layer(source, NORM_TYPES) is None:
                        return f"its result goes to {conv}, and so does that of {self._label(source)}"
                convs.add(conv)
            for node in passed:
                if node.kwargs.get("inplace") or self._label(node).endswith("_"):
                    return f"its result is changed in place by the function {self._label(node)}"
        return convs or "its result goes nowhere"

    def is_fresh(self, norm: str) -> bool:
        """Whether what a normalization is given is made for it alone, so that it may be changed in place."""
        sources = [call.all_input_nodes[0] for call in self.calls[norm]]
        return all(len(s.users) == 1 and (s.target is torch.cat or self._layer(s, AnyConv)) for s in sources)

    def relus(self, convs: set[str], norms: set[str]) -> tuple[set[str], dict[str, bool]]:
        """Find the ReLUs that convolutions can take in.

        Args:
            convs: Names of the convolutions that are asked.
            norms: Names of normalizations that are removed.

        Returns:
            Names of those whose results all go to a ReLU alone, and names of the ReLUs, each with whether it gets
            nothing else. There are none if some part of the network cannot be traced.
        """
        taken: set[fx.Node] = set()
        taking: set[str] = set()
        for conv in convs if not self.untraced else ():
            ends = [_follow(call, lambda node: self._is_removed(node, norms))[1] for call in self.calls[conv]]
            if all(len(end) == 1 and self._is_relu(end[0]) for end in ends):
                taking.add(conv)
                taken.update(end for (end,) in ends)
        relus = {self.names[self.modules[node]] for node in taken}
        return taking, {name: taken.issuperset(self.calls[name]) for name in relus}

    def activations(self, norm: str) -> list[str]:
        """Names of the layers between a normalization and the convolutions behind it."""
        passed = [node for call in self.calls[norm] for node in _follow(call, self._is_activation)[0]]
        return [self.names[self.modules[node]] for node in passed if node in self.modules]

    def unpaired(self, layer: str) -> str:
        """Say why a layer that could be replaced is in no pair."""
        if layer not in self.layers:
            return "it keeps statistics of the batch, and is no known normalization"
        if problem := self._conv_obstacle(layer):
            return problem
        if layer not in self.calls:
            return self.untraced.get(layer, "it is not called")
        ends = [end for call in self.calls[layer] for end in _follow(call, self._is_activation)[1]]
        where = " and ".join(dict.fromkeys(map(self._label, ends)))
        return f"no normalization forms a pair with it: its result goes to {where}"

    def _conv_obstacle(self, conv: str) -> str | None:
        if any(len(call.args) + len(call.kwargs) > 1 for call in self.calls.get(conv, ())):
            return "it is called with the size of its output"
        return conv_obstacle(self.layers[conv])

    def _layer(self, node: fx.Node, kinds: UnionType | tuple[type, ...]) -> str | None:
        module = self.modules.get(node)
        return self.names[module] if isinstance(module, kinds) else None

    def _is_identity(self, node: fx.Node) -> bool:
        return isinstance(self.modules.get(node), nn.Identity)

    def _is_removed(self, node: fx.Node, norms: set[str]) -> bool:
        """Whether nothing is computed at a node once some normalizations are removed."""
        norm = self._layer(node, NORM_TYPES)
        return self._is_identity(node) or (norm in norms and not any(self.layers[norm].children()))

    def _is_relu(self, node: fx.Node) -> bool:
        relu = self.modules.get(node)
        return type(relu) is nn.ReLU and not has_hooks(relu)

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
