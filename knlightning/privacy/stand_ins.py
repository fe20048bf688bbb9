"""Parameters that functions use: what stands in for them in a forward pass, and follows them until samples come in.

A class token, a position embedding, the scale of a block or the weights that an attention hands to a function belong
to no layer with a rule of its own. While their module computes, a `StandIn` has their place. What functions
make of it alone (views, a table that is looked up, an exponential) is a stand-in again. Where it meets samples,

- by addition, multiplication and the like it is expanded, so that each sample has a copy, and autograd finds the
  gradient of each copy by itself;
- in a function of `knlightning.privacy.function_rules` what the function was given is kept, as for layers;
- any other function is refused.

So the gradients of the samples are exact whatever the module computes. Those at the stand-in are carried back to the
parameters by autograd, for all samples at once.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knlightning.privacy.batches import map_tensors
from knlightning.privacy.rules import Parts, Rule

ELEMENTWISE = {"add", "sub", "rsub", "mul", "where", "addcmul", "radd", "iadd", "isub", "rmul", "imul"}
"""Functions without a part of one sample in another, whose first dimension is that of the samples."""


class StandIn(Tensor):
    """A tensor made of parameters alone.

    Attributes:
        plain: Its value, with the graph back to the leaves.
        leaves: The parameters that it is made of, by the leaves in their place.
        meeting: What happens where it meets samples.
    """

    plain: Tensor
    leaves: dict[Tensor, nn.Parameter]
    meeting: "Meeting"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors: list[Tensor] = []
        map_tensors((args, kwargs or {}), lambda tensor: tensors.append(tensor) or tensor)  # type: ignore[func-returns-value]
        stand_ins = [tensor for tensor in tensors if isinstance(tensor, StandIn)]
        if not stand_ins:  # inside of what torch itself makes of one
            return super().__torch_function__(func, types, args, kwargs)
        return stand_ins[0].meeting.call(func, args, kwargs or {}, stand_ins, tensors)


def plain(value: Any) -> Any:
    """Put the values of stand-ins in their places, in tensors or a structure of them."""
    return map_tensors(value, lambda tensor: tensor.plain if isinstance(tensor, StandIn) else tensor)


class Meeting:
    """Compute what functions make of stand-ins, and find the gradients of the samples where these come in.

    Args:
        names: Names of the parameters, for messages.
        rules: Functions, and what is called in their place, with this object first.
        used: Is called in the forward pass with each parameter that takes part in it once more.
        receive: Is called in the backward pass with gradients of samples at parameters.
        watch: Is called with an input, an output and a rule; calls the rule in the backward pass with the input and
            the gradient at the output, one row for each sample.
        samples_of: Tells how many samples a number of rows belongs to.
    """

    def __init__(
        self,
        names: dict[nn.Parameter, str],
        rules: dict[Any, Callable[..., Any]],
        used: Callable[[nn.Parameter], None],
        receive: Callable[[Parts], None],
        watch: Callable[[str, Tensor, Tensor, Rule], None],
        samples_of: Callable[[int], int],
    ) -> None:
        self.names, self.rules, self.used, self.receive = names, rules, used, receive
        self._watch, self._samples_of = watch, samples_of

    def put_stand_ins(self, modules: Iterable[nn.Module]) -> None:
        """Put them before trainable parameters: what is found in a module itself hides what it has registered."""
        for module in modules:
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    leaf = parameter.detach().requires_grad_()
                    object.__setattr__(module, name, self._made(leaf, {leaf: parameter}))

    @staticmethod
    def take_stand_ins(modules: Iterable[nn.Module]) -> None:
        """Take them away."""
        for module in modules:
            for name in [name for name, value in vars(module).items() if isinstance(value, StandIn)]:
                object.__delattr__(module, name)

    def _made(self, value: Tensor, leaves: dict[Tensor, nn.Parameter]) -> StandIn:
        made = value.detach().as_subclass(StandIn)
        made.plain, made.leaves, made.meeting = value, leaves, self
        return made

    def call(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        stand_ins: list[StandIn],
        tensors: list[Tensor],
    ) -> Any:
        """Call a function that was given stand-ins.

        Args:
            func: The function.
            args: What it was given by position.
            kwargs: What it was given by name.
            stand_ins: The stand-ins of these.
            tensors: All tensors of these.

        Raises:
            ValueError: If there is no rule for it.
        """
        if not torch.is_grad_enabled():
            return func(*plain(args), **plain(kwargs))
        name = getattr(func, "__name__", "").strip("_")
        if name in ("backward", "register_hook"):
            raise ValueError(f"{self._named(stand_ins)}: a loss or a layer got no samples, but parameters alone")
        if name in ("expand", "expand_as", "repeat") and isinstance(args[0], StandIn):
            return self._expanded(args[0], func(*plain(args), **plain(kwargs)))
        others = [tensor for tensor in tensors if not isinstance(tensor, StandIn)]
        if any(tensor.requires_grad for tensor in others) or func is F.embedding:  # by numbers of each sample
            if func in self.rules and not isinstance(args[0], StandIn):
                return self.rules[func](self, *args, **kwargs)
            if name in ELEMENTWISE:
                return self._elementwise(func, args, kwargs, tensors)
            raise ValueError(
                f"{self._named(stand_ins)} meets samples in the function {name}, for which there is no rule of single"
                " samples: freeze it, or use it in a layer, or in a sum or a product with the samples"
            )
        value = func(*plain(args), **plain(kwargs))
        leaves = {leaf: parameter for each in stand_ins for leaf, parameter in each.leaves.items()}

        def wrapped(tensor: Tensor) -> Tensor:
            return self._made(tensor, leaves) if tensor.requires_grad else tensor

        return value if isinstance(value, torch.Size) else map_tensors(value, wrapped)

    def _named(self, stand_ins: Iterable[StandIn]) -> str:
        return ", ".join(dict.fromkeys(self.names[p] for each in stand_ins for p in each.leaves.values()))

    def _expanded(self, stand_in: StandIn, value: Tensor) -> Tensor:
        """Give each sample its copy where a dimension of 1, or a new one, becomes that of the samples."""
        more = value.dim() - stand_in.plain.dim()
        if more == 0 and (stand_in.plain.shape[:1] != (1,) or value.shape[1:] != stand_in.plain.shape[1:]):
            return self._made(value, stand_in.leaves)
        each = self.for_samples(stand_in, len(value))
        return self._aligned(each, stand_in, value.dim()).expand(value.shape)

    @staticmethod
    def _aligned(each: Tensor, stand_in: StandIn, dims: int) -> Tensor:
        shape = stand_in.plain.shape
        return each.view(len(each), *((1,) * (dims - 1 - len(shape)) + shape if len(shape) < dims else shape[1:]))

    def _elementwise(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> Tensor:
        shape = torch.broadcast_shapes(*(plain(tensor).shape for tensor in tensors))
        for tensor in tensors:
            if isinstance(tensor, StandIn) and tensor.plain.dim() == len(shape) and tensor.plain.shape[:1] != (1,):
                raise ValueError(
                    f"{self._named([tensor])} of the shape {tuple(tensor.plain.shape)} meets samples in values of the"
                    f" shape {tuple(shape)}: a parameter must be the same for all samples, which come first"
                )
        samples = self._samples_of(shape[0])
        windows = shape[0] // samples if samples else 1

        def each(tensor: Tensor) -> Tensor:
            if isinstance(tensor, StandIn):
                copies = self._aligned(self.for_samples(tensor, samples), tensor, len(shape))
                return copies.unsqueeze(1) if windows > 1 else copies
            if windows > 1 and tensor.dim() == len(shape) and len(tensor) == shape[0]:
                return tensor.unflatten(0, (samples, windows))
            return tensor

        value = func(*map_tensors(args, each), **map_tensors(kwargs, each))
        return value.flatten(0, 1) if windows > 1 else value

    def for_samples(self, stand_in: StandIn, samples: int) -> Tensor:
        """Make a copy for each sample; [samples, *shape]. What becomes of it must be one row for each."""
        each = stand_in.plain.detach().expand(samples, *stand_in.plain.shape).requires_grad_()
        for parameter in stand_in.leaves.values():
            self.used(parameter)

        def received(copies: Tensor) -> None:
            assert copies.grad is not None
            self.receive((self._at_parameters(stand_in, copies.grad), []))
            copies.grad = None

        each.register_post_accumulate_grad_hook(received)
        return each

    def _at_parameters(self, stand_in: StandIn, grads: Tensor) -> dict[nn.Parameter, Tensor]:
        """Carry gradients of samples at a stand-in back to its parameters."""
        if stand_in.plain in stand_in.leaves:
            return {stand_in.leaves[stand_in.plain]: grads}
        leaves = list(stand_in.leaves)
        if not len(grads):
            return {stand_in.leaves[leaf]: leaf.new_zeros(0, *leaf.shape) for leaf in leaves}
        found = torch.autograd.grad(
            stand_in.plain, leaves, grads.to(stand_in.plain.dtype), retain_graph=True, is_grads_batched=True,
            allow_unused=True,
        )  # fmt: skip
        return {stand_in.leaves[leaf]: each for leaf, each in zip(leaves, found, strict=True) if each is not None}

    def watch(
        self,
        function: str,
        x: Tensor,
        output: Tensor,
        parameters: Iterable[Any],
        rule: Callable[[Tensor, Tensor], Parts],
    ) -> Tensor:
        """Find the gradients of the samples at parameters of a function, in its backward pass.

        Args:
            function: Its name, for messages.
            x: The samples that it was given.
            output: What it made of them without the graph of the parameters.
            parameters: What it was given as parameters; those that are no stand-ins are not trained.
            rule: Makes of the samples and the gradient at the output the gradients of samples, at the values of the
                stand-ins.

        Returns:
            The output.
        """
        stand_ins = {each.plain: each for each in parameters if isinstance(each, StandIn)}
        for each in stand_ins.values():
            for parameter in each.leaves.values():
                self.used(parameter)

        def at_parameters(x: Tensor, grad: Tensor) -> Parts:
            vectors, products = rule(x, grad)
            found: dict[nn.Parameter, Tensor] = {}
            kept = []
            for product in products:
                stand_in = stand_ins[product.weight]
                if product.weight in stand_in.leaves:
                    kept.append(replace(product, weight=stand_in.leaves[product.weight]))
                else:
                    vectors[product.weight] = product.samples()
            for value, grads in vectors.items():
                for parameter, samples in self._at_parameters(stand_ins[value], grads).items():
                    found[parameter] = found[parameter] + samples if parameter in found else samples
            return found, kept

        if not output.requires_grad:  # nothing else needs a gradient
            output = output.detach().requires_grad_()
        self._watch(f"{self._named(stand_ins.values())} in the function {function}", x, output, at_parameters)
        return output
