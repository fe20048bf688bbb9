"""The list of networks, and how their factories get their arguments."""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import nn

from knlightning.nn.normalization import NORMS

Task = Literal["classification", "segmentation"]

P = ParamSpec("P")
Options = TypeVar("Options")
Network = TypeVar("Network", bound=nn.Module)
Factory = TypeVar("Factory", bound=Callable[..., nn.Module])


@dataclass(frozen=True)
class Model:
    """A network of this package, made by a function that stands in a file of this folder.

    Args:
        name: Name of the function.
        make: The function; all of its arguments have defaults.
        task: What its output is for: logits of images, or of every pixel.
        weights: Where published weights are and what they were trained on; empty if there are none.
        tables: Tables of the paper that report it, as `knl reproduce` calls them.
    """

    name: str
    make: Callable[..., nn.Module]
    task: Task
    weights: str
    tables: tuple[str, ...]

    @property
    def defaults(self) -> dict[str, Any]:
        """The arguments by name, with their defaults."""
        return {name: p.default for name, p in inspect.signature(self.make).parameters.items()}

    @property
    def norm(self) -> str | None:
        """The normalization by default; None if it cannot be chosen."""
        return self.defaults.get("norm")

    @property
    def norms(self) -> tuple[str, ...]:
        """All normalizations that it can be built with."""
        return tuple(name for name in NORMS if self.allows(name)) if self.norm else ()

    @property
    def images(self) -> str:
        """The sizes of images that it is for, with that of the defaults first."""
        sizes = {None: "large", False: "large, small", True: "small, large"}[self.defaults.get("low_resolution")]
        return f"{sizes}, any shape" if self.task == "segmentation" else sizes

    @property
    def num_parameters(self) -> int:
        """Number of parameters with the default arguments; nothing is allocated."""
        with torch.device("meta"):
            return sum(p.numel() for p in self.make().parameters())

    def allows(self, norm: str) -> bool:
        """Whether it can be built with a normalization, whose groups may not divide its channels."""
        layer = NORMS[norm].make
        takes_any = layer is None or _possible(lambda: layer(1, self.defaults["eps"]))
        return takes_any or _possible(lambda: self.make(norm=norm))  # the second is slow


def _possible(make: Callable[[], nn.Module]) -> bool:
    try:
        with torch.device("meta"):
            make()
    except ValueError:
        return False
    return True


_MODELS: dict[str, Model] = {}


def register(
    *, task: Task = "classification", weights: str = "", tables: Sequence[str] = ()
) -> Callable[[Factory], Factory]:
    """Put the function that is decorated on the list of networks; arguments as in `Model`.

    Its networks get an attribute `made_by`: the name of the function, and all its arguments but published weights.
    """

    def decorate(make: Factory) -> Factory:
        @functools.wraps(make)
        def making(*args: Any, **kwargs: Any) -> nn.Module:
            network: Any = make(*args, **kwargs)
            bound = inspect.signature(make).bind(*args, **kwargs)
            bound.apply_defaults()
            arguments = {name: value for name, value in bound.arguments.items() if name != "weights"}
            network.made_by = {"architecture": make.__name__, "model_args": arguments}
            return network

        made: Any = making
        _MODELS[make.__name__] = Model(make.__name__, made, task, weights, tuple(tables))
        return made

    return decorate


def list_models() -> list[Model]:
    """List the networks of this package, found in the files of its folder.

    Returns:
        The networks in the order of their files and, within a file, of their functions.
    """
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
    return sorted(_MODELS.values(), key=lambda model: model.make.__module__)


def with_arguments_of(
    options: Callable[P, Options], **defaults: Any
) -> Callable[[Callable[[Options], Network]], Callable[P, Network]]:
    """Give a function that takes an object of options their names as its own arguments.

    The parser of configurations, the type checker and `help` see these, each described where the options are.

    Args:
        options: Class of the options, with arguments by keyword only.
        **defaults: What the function sets by default in place of the class.

    Returns:
        Decorator of a function that makes a network of an object of the class.
    """
    signature = inspect.signature(options)
    parameters = [p.replace(default=defaults.get(p.name, p.default)) for p in signature.parameters.values()]
    bases = [base for base in getattr(options, "__mro__", (options,)) if base is not object]  # a subclass adds its own
    arguments = "Args:\n" + "\n".join(inspect.cleandoc(base.__doc__ or "").partition("Args:\n")[2] for base in bases)

    def decorate(build: Callable[[Options], Network]) -> Callable[P, Network]:
        annotation = inspect.signature(build).return_annotation

        @functools.wraps(build)
        def make(*args: P.args, **kwargs: P.kwargs) -> Network:
            chosen: Any = {**defaults, **kwargs}
            return build(options(*args, **chosen))

        make.__doc__ = f"{inspect.cleandoc(build.__doc__ or '')}\n\n{arguments}"
        make.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": annotation}
        made: Any = make
        made.__signature__ = signature.replace(parameters=parameters, return_annotation=annotation)
        return make

    return decorate
