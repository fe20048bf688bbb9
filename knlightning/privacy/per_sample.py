"""Norms of the gradients of single samples, and weighted sums of these gradients, from one backward pass.

    gradients = PerSampleGradients(network)
    gradients.attach()
    ...
    loss = F.cross_entropy(network(images), labels)
    loss.backward()
    norms = gradients.norms()                                   # [N]
    gradients.accumulate((max_grad_norm / norms).clamp(max=1))  # adds to `summed_grad` of every parameter
    ...
    gradients.detach()

Autograd computes no gradient of a weight here: `p.grad` is left as it is. What it would use for that, the input of a
layer and the gradient at its output, is kept until the norms are known, and then summed up with the weights of the
samples (book-keeping: Bu et al., ICML 2023). Where the gradients of the samples are small beside these two, they are
kept instead.

With `loss_reduction="mean"` the loss is taken as the mean over the N samples of the batch, so that a sample's gradient
is N times its part in the gradient of the loss. A loss that is divided further, as Lightning does where gradients of k
batches are accumulated, makes norms k times too small: the norms, and what is accumulated, are linear in it.
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from knlightning.checks import check_choice, check_number
from knlightning.internals.torch import version_of
from knlightning.nn.functional import normalization_of
from knlightning.privacy.function_rules import RULES
from knlightning.privacy.precision import full_float32
from knlightning.privacy.rules import (
    COMPOSITES,
    TYPES,
    WINDOWED,
    Factors,
    KNConv,
    LossReduction,
    Parts,
    Rule,
    check_rules,
    kind_of,
    parts_of,
)
from knlightning.privacy.stand_ins import Meeting, StandIn


@dataclass
class _Pass:
    """A forward pass through a layer or a function, until its backward pass."""

    name: str
    x: Tensor | None
    version: int
    rule: Rule | None
    samples: int


class PerSampleGradients:
    """Watch a network, and compute the gradients of the samples of a batch after its backward pass.

    Works with any layer of `knlightning.privacy.rules`, and with modules that give their parameters to functions of
    `knlightning.privacy.function_rules`, several times in a pass or with parameters in common as well; their
    contributions to a sample's gradient are added before norms are taken. Norms and sums are computed in float32, or in
    float64 for such a network. A parameter that took no part in a pass counts as zero.
    Samples whose norm is not finite take no part in the sums, whatever their weight.

    Args:
        module: The network; trained eagerly, by one backward pass for each forward pass.
        loss_reduction: Whether the loss is the mean or the sum over the samples.
        views: How many neighbouring rows of a batch are views of one sample, whose gradient is the sum of theirs or,
            where the loss is a mean, their mean (augmentation multiplicity; De et al., 2022). N below counts samples.

    Raises:
        ArgumentError: If loss_reduction or views is out of its range.
        ValueError: If there is no exact rule for a layer with trainable parameters; it names all of these.
    """

    def __init__(self, module: nn.Module, loss_reduction: LossReduction = "mean", views: int = 1) -> None:
        check_choice("loss_reduction", loss_reduction, get_args(LossReduction))
        check_number("views", views, at_least=1, integer=True)
        if problems := check_rules(module):
            raise ValueError("gradients of single samples cannot be computed:\n" + "\n".join(problems))
        self.module = module
        self.loss_reduction: LossReduction = loss_reduction
        self.views = views
        self._handles: list[RemovableHandle] = []
        self._windows: list[int] = []
        self._own: dict[nn.Module, list[nn.Parameter]] = {}
        self.release()

    def attach(self) -> None:
        """Begin to watch: from now on backward passes give gradients of samples, and none in `p.grad`.

        Parameters that are frozen now are left out. Passes without gradients are not watched.

        Raises:
            RuntimeError: If it is attached already.
        """
        if self._handles:
            raise RuntimeError("the network is watched already")
        names = {p: name for name, p in self.module.named_parameters() if p.requires_grad}
        self._meeting = Meeting(names, RULES, self._use, self._receive, self._watch, self._samples_of)
        in_composites: set[nn.Module] = set()
        for name, layer in self.module.named_modules():
            if kind_of(layer) in WINDOWED:
                self._handles.append(layer.register_forward_pre_hook(self._before_windows))
                self._handles.append(layer.register_forward_hook(self._after_windows, always_call=True))
            parts = list(layer.modules()) if kind_of(layer) in COMPOSITES else [layer]
            own = [p for part in parts for p in part.parameters(recurse=False) if p.requires_grad]
            if not own or layer in in_composites:
                continue
            self._own[layer] = own
            before: Any = self._before
            # it runs after an exception too, for the parameters are to be trainable again
            after: Any = partial(self._after, name=name)
            if len(parts) > 1 or type(layer) not in TYPES:
                in_composites.update(parts)
                before, after = partial(self._before_module, parts), partial(self._after_module, parts)
            self._handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(layer.register_forward_hook(after, with_kwargs=True, always_call=True))
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                stray = partial(_stray, name)
                self._handles.append(parameter.register_post_accumulate_grad_hook(stray))

    def detach(self) -> None:
        """Leave the network as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._own.clear()
        self.release()

    def release(self) -> None:
        """Forget a batch that is not to be summed, before the next one."""
        self._uses: Counter[Tensor] = Counter()
        self._vectors: dict[Tensor, Tensor] = {}
        self._products: list[Factors] = []
        self._squares: list[Tensor] = []
        self._finite: Tensor | None = None
        self._samples: int | None = None

    def norms(self) -> Tensor:
        """Compute the norm of each sample's gradient over all parameters.

        Returns:
            Float tensor [N]; not finite for a sample that spoils the network.

        Raises:
            RuntimeError: If there was no backward pass since the last release.
        """
        if self._samples is None:
            raise RuntimeError(
                "no backward pass was seen: call attach() before the forward pass, and norms() once after each backward"
            )
        samples = [rows.flatten(1).unflatten(0, (-1, self.views)).sum(1) for rows in self._vectors.values()]
        squares = [torch.linalg.vector_norm(each, dim=1).square() for each in samples]
        norms = torch.stack(squares + self._squares).sum(0).sqrt() * self._factor()
        self._finite = norms.isfinite()
        return norms

    def accumulate(self, weights: Tensor, attribute: str = "summed_grad") -> None:
        """Add the weighted sum of the samples' gradients to an attribute of every trainable parameter.

        Frees what was kept for it on the way, so there is one sum for each backward pass.

        Args:
            weights: Float tensor [N].
            attribute: Name of the attribute, a tensor of the parameter's shape; made if it is missing or None. The
                default is that of Opacus' optimizers.

        Raises:
            RuntimeError: If the norms of this batch were not computed before.
            ValueError: If there is not one weight for each sample.
        """
        if self._finite is None:
            raise RuntimeError("call norms() first: it finds which samples can be summed")
        if weights.shape != self._finite.shape:
            raise ValueError(f"weights must have shape {tuple(self._finite.shape)}, got {tuple(weights.shape)}")
        kept = None if bool(self._finite.all()) else self._finite.repeat_interleave(self.views)
        weights = weights.repeat_interleave(self.views)
        weights = (weights if kept is None else weights[kept]) * self._factor()
        for own in self._own.values():
            for parameter in own:
                if getattr(parameter, attribute, None) is None:
                    setattr(parameter, attribute, torch.zeros_like(parameter, requires_grad=False))
        with torch.no_grad(), torch.autocast(weights.device.type, enabled=False), full_float32():
            while self._vectors:
                vector, samples = self._vectors.popitem()
                samples = samples if kept is None else samples[kept]
                total = weights.to(samples.dtype) @ samples.flatten(1)
                getattr(vector, attribute).add_(total.view(vector.shape))
            while self._products:
                product = self._products.pop()
                product = product if kept is None else product.select(kept)
                getattr(product.weight, attribute).add_(product.weighted_sum(weights))
        self.release()

    def _factor(self) -> float:
        return (self._samples or 0) / self.views if self.loss_reduction == "mean" else 1.0

    def _before(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hide the parameters from autograd, which would compute the gradient of the batch, of no use here."""
        if not torch.is_grad_enabled():
            return None
        if not args or not isinstance(args[0], Tensor) or isinstance(args[0], StandIn):
            raise TypeError(f"{type(layer).__name__} must be called with its input as the first positional argument")
        for parameter in self._own[layer]:
            parameter.requires_grad_(False)
            self._use(parameter)
        return _with_gradient(args), kwargs

    def _after(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, name: str) -> None:
        for parameter in self._own[layer]:
            parameter.requires_grad_()
        if output is None or not torch.is_grad_enabled():  # None after an exception
            return
        x, normalization, shown = args[0], None, None
        if isinstance(layer, KNConv):
            normalization = normalization_of(output)
            x = normalization.input
            shown = output.detach() if normalization.relu_output else None

        def rule(x: Tensor, grad: Tensor) -> Parts:
            grad = grad if shown is None else torch.ops.aten.threshold_backward(grad, shown, 0)
            return parts_of(layer, x, grad, normalization, self._own[layer])

        self._watch(f"{name} ({type(layer).__name__})", x, output, rule)

    def _before_module(
        self, parts: list[nn.Module], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not torch.is_grad_enabled():
            return None
        self._meeting.put_stand_ins(parts)
        return _with_gradient(args), kwargs

    def _after_module(self, parts: list[nn.Module], *of_the_call: Any) -> None:
        self._meeting.take_stand_ins(parts)

    def _before_windows(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self._windows.append(len(args[0]))

    def _after_windows(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._windows.pop()

    def _samples_of(self, rows: int) -> int:
        return self._windows[-1] if self._windows and rows % max(self._windows[-1], 1) == 0 else rows

    def _use(self, parameter: Tensor) -> None:
        self._uses[parameter] += 1

    def _watch(self, name: str, x: Tensor, output: Tensor, rule: Rule) -> None:
        seen = _Pass(name, x.detach(), version_of(x), rule, self._samples_of(len(x)))
        output.register_hook(partial(self._backward, seen))

    def _backward(self, seen: _Pass, grad: Tensor) -> None:
        x, rule = seen.x, seen.rule
        seen.x = seen.rule = None  # the graph may live on, and this with it
        if x is None or rule is None:
            raise RuntimeError(f"{seen.name}: a second backward pass through one forward pass")
        if version_of(x) != seen.version:
            raise RuntimeError(
                f"{seen.name}: its input was changed in place after the forward pass, and its gradient can no longer be"
                " computed; use operations that make a new tensor"
            )
        self._count(seen.samples, seen.name)
        grad = grad.detach()
        if len(x) != seen.samples:
            x, grad = (each.unflatten(0, (seen.samples, -1)) for each in (x, grad))
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            parts = rule(x, grad)
        self._receive(parts)

    def _receive(self, parts: Parts) -> None:
        vectors, products = parts
        for parameter, samples in vectors.items():
            self._count(len(samples), "a parameter of a module")
            self._add(parameter, samples)
            if self._uses[parameter] > 1:
                self._add_earlier(parameter)
        for product in (replace(product, views=self.views) for product in products):
            if self._uses[product.weight] > 1 or product.small():
                self._add(product.weight, product.samples())
                self._add_earlier(product.weight)
            else:
                self._squares.append(product.squared_norms())
                self._products.append(product)

    def _add_earlier(self, weight: Tensor) -> None:
        """Add what was kept in factors of a weight that turns out to be used again.

        Its uses are known before the first backward pass, except with checkpoints that run a part of the network
        again in the backward pass itself.
        """
        for number, product in reversed(list(enumerate(self._products))):
            if product.weight is weight:
                del self._products[number], self._squares[number]
                self._add(weight, product.samples())

    def _add(self, parameter: Tensor, samples: Tensor) -> None:
        samples = samples if samples.dim() > 1 else samples.unsqueeze(1)  # of a number
        if parameter in self._vectors:
            self._vectors[parameter] = self._vectors[parameter] + samples
        else:
            self._vectors[parameter] = samples

    def _count(self, samples: int, name: str) -> None:
        if self._samples not in (None, samples):
            raise RuntimeError(
                f"{name} was given {samples} samples, and other layers {self._samples}: the first dimension must be "
                "that of the samples in every layer. Freeze a layer that is given anything else, such as parts of "
                "samples or positions; call release() between batches"
            )
        self._samples = samples


def _with_gradient(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Let the first argument need a gradient, so that there is a graph at all."""
    if not args or not isinstance(args[0], Tensor) or args[0].requires_grad or not args[0].is_floating_point():
        return args
    return args[0].detach().requires_grad_(), *args[1:]


def _stray(name: str, parameter: Tensor) -> None:
    parameter.grad = None
    raise RuntimeError(
        f"{name} got a gradient from outside of its layer, such as a penalty in the loss, another method of the layer, "
        "or a function that uses the weight itself, which has no parts for single samples: use weight_decay of the "
        "optimizer, call the layer, or freeze it"
    )
