"""The number of classes of a network, where it follows from the data."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from pkgutil import resolve_name

from jsonargparse import ArgumentParser, Namespace

from knlightning.protocols import describe


def take_from_data(parser: ArgumentParser, config: Namespace) -> None:
    """Give the backbone as many classes as the data have, unless the configuration gives it another number.

    The number that the backbone has by default counts as not given: with other data it could only be an error.

    Args:
        parser: Of the configuration.
        config: The configuration, which is changed in place. Data are not read for it: it stays as it is where a
            datamodule does not know its classes before.
    """
    model = config.get("model.init_args.backbone")
    arguments = model.get("init_args") if isinstance(model, Namespace) else None
    if arguments is None or "num_classes" not in arguments or config.get("data") is None:
        return
    default = None
    with suppress(ImportError, AttributeError, ValueError, KeyError):  # of a class path that is wrong, the parser tells
        made = resolve_name(":".join(model.class_path.rsplit(".", 1)))  # a module may have the name of its function
        signature = ArgumentParser()  # follows **kwargs, too: networks of torchvision have the argument only there
        add = signature.add_class_arguments if inspect.isclass(made) else signature.add_function_arguments
        add(made, fail_untyped=False)
        default = signature.get_defaults().get("num_classes")
    if arguments.num_classes != default:
        return
    data = parser.instantiate(Namespace(data=config.data)).data
    find: Callable[[], Sequence[str]] = getattr(data, "find_class_names", tuple)  # before the data are read
    arguments.num_classes = describe(data).num_classes or len(find()) or arguments.num_classes
