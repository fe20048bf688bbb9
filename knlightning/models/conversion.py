"""Networks of other packages, kernel normalized, by their name."""

import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pkgutil import resolve_name
from typing import Any

import torchvision
from torch import nn

from knlightning.checks import ArgumentError, check, check_number
from knlightning.models.kernel_normalize import kernel_normalize
from knlightning.models.replaceable import GroupStatistics, Rest
from knlightning.nn.functional import EvalStatistics


def converted(
    name: str,
    num_classes: int = 1000,
    dropout_p: float = 0.05,
    eval_statistics: EvalStatistics = "expected",
    eps: float = 1e-5,
    rest: Rest = "kernel",
    group_statistics: GroupStatistics = "all",
    arguments: dict[str, Any] | None = None,
) -> nn.Module:
    """Make a network of timm, of torchvision or of your own, and kernel normalize it.

    Args:
        name: `timm/NAME`, `torchvision/NAME`, or the import path of a class or function that makes a network, such as
            `my_nets.make_net`. It is imported and called: take configurations only from whom you trust.
        num_classes: Number of classes; it is given to the function by this name.
        dropout_p: As in `knlightning.models.kernel_normalize`, as the four arguments that follow.
        eval_statistics: Evaluation statistics of the new layers.
        eps: Added to the variance in the new layers.
        rest: What batch normalization in no pair becomes.
        group_statistics: Which channels the statistics of grouped convolutions are over.
        arguments: Further arguments of the function, such as `{pretrained: true}` of timm.

    Returns:
        The network. Its attribute `conversion` is the first line of the report.

    Raises:
        ArgumentError: If there is no such network, or an argument is out of its range.
        ValueError: If nothing in the network can be kernel normalized.
        ImportError: If timm is needed and not installed.
    """
    check_number("num_classes", num_classes, at_least=1, integer=True)
    made = _maker(name)(num_classes=num_classes, **(arguments or {}))
    check(
        isinstance(made, nn.Module), "name", name, f"what makes a torch.nn.Module; this makes a {type(made).__name__}"
    )
    network, report = kernel_normalize(made, dropout_p, eval_statistics, eps, rest, group_statistics)
    setattr(network, "conversion", report.summary)  # noqa: B010 # of a module mypy knows tensors and modules alone
    return network


def _maker(name: str) -> Callable[..., Any]:
    """Find what makes a network."""
    package, slash, model = name.partition("/")
    if not slash:
        try:
            found = resolve_name(":".join(name.rsplit(".", 1)))  # a module may have the name of its function
        except (ImportError, AttributeError, ValueError) as error:
            allowed = "timm/NAME, torchvision/NAME, or an import path such as my_nets.make_net"
            raise ArgumentError("name", name, allowed, str(error)) from error
        check(callable(found), "name", name, "the import path of a class or function")
        return found
    if package == "timm":
        try:
            timm = import_module("timm")
        except ImportError as error:
            raise ImportError(f"{name} is a network of timm, which is not installed: pip install timm") from error
        known, make = timm.is_model(model), timm.create_model
    else:
        check(package == "torchvision", "name", name, "timm/NAME, torchvision/NAME, or an import path")
        known, make = model in torchvision.models.list_models(), _of_torchvision
    check(
        known,
        "name",
        name,
        f"a network of {package}, see {package}{'' if package == 'timm' else '.models'}.list_models()",
    )
    return partial(make, model)


def _of_torchvision(model: str, **arguments: Any) -> nn.Module:
    """Make a network whose backbone downloads no weights unless asked to, and which gives logits alone."""
    if "weights_backbone" in inspect.signature(torchvision.models.get_model_builder(model)).parameters:
        arguments.setdefault("weights_backbone", None)
    network = torchvision.models.get_model(model, **arguments)
    if model in torchvision.models.list_models(module=torchvision.models.segmentation):
        network.register_forward_hook(_logits)
    return network


def _logits(network: nn.Module, inputs: Any, outputs: Any) -> Any:
    return outputs["out"]
