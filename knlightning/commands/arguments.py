"""What commands do with arguments that are wrong: a message without a traceback, which names the argument in full."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from knlightning.checks import ArgumentError

DEBUG_VARIABLE = "KNL_DEBUG"
"""If set, errors come with their traceback."""
PLAIN = (ValueError, OSError, ArithmeticError, RuntimeError, MemoryError)
"""Errors of which the configuration or the data may be the cause, beside one of Lightning's."""
MEMORY_HINT = (
    "Set batch_size or eval_batch_size lower, or take smaller images. The segmentation of large images is computed "
    "window by window with eval_window."
)
"""What to do when memory runs out."""


@contextmanager
def plain_errors(prog: str) -> Iterator[None]:
    """Turn errors of which the configuration or the data are the cause into a message and an exit status.

    Args:
        prog: Name of the command.

    Raises:
        SystemExit: If there is such an error, with status 2; if there is an interrupt, with status 130.
    """
    try:
        yield
    except BrokenPipeError:  # nobody is there to read a message: `knl` ends
        raise
    except Exception as error:
        # here: commands that need neither Lightning nor torch start without them
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        from knlightning.analysis.measure import ran_out_of_memory
        from knlightning.internals.torch import WORKER_HINT, worker_failure

        if not isinstance(error, (*PLAIN, MisconfigurationException)):
            raise
        if ran_out_of_memory(error):
            first = (str(error) or type(error).__name__).partition("\n")[0]
            error = OSError(f"The memory does not suffice ({first}). {MEMORY_HINT}")
        if failure := worker_failure(error):  # raised wherever the signal comes
            error = OSError(f"{failure} {WORKER_HINT}")
        foreign = isinstance(error, RuntimeError) and "loading state_dict" not in str(error)
        if foreign or os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"{prog}: error: {error}\n({DEBUG_VARIABLE}=1 shows where)", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def find_argument(error: ArgumentError, config: dict[str, Any]) -> ArgumentError:
    """Complete an error with the keys at which the argument stands in a configuration.

    Args:
        error: Names the argument as the function does that raised it.
        config: The configuration, or the arguments of a command, as nested dictionaries.

    Returns:
        The same error with the full key, such as `--seeds` or `model.init_args.optimizer.init_args.lr`; with all of
        them if the same name has the same value several times. If the value does not occur, the only key with this
        name; if there are none or several, the error as it is.
    """
    value = _plain(error.value)
    named = [(key, given) for key, given in walk(config) if key.rpartition(".")[2] == error.name]
    found = [key for key, given in named if _plain(given) == value] or [key for key, _ in named if len(named) == 1]
    keys = [key if "." in key else f"--{key}" for key in found]
    return ArgumentError(" or ".join(keys) or error.name, error.value, error.allowed, error.hint)


def walk(config: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """List the values of a configuration at all depths.

    Args:
        config: Nested dictionaries and lists.
        key: Where it stands in a larger one.

    Yields:
        Dotted key and value; of `trainer.callbacks` such as `trainer.callbacks[0].init_args.decay`.
    """
    if key:
        yield key, config
    if isinstance(config, dict):
        for name, inner in config.items():
            yield from walk(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(config, list):
        for place, inner in enumerate(config):
            yield from walk(inner, f"{key}[{place}]")


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """Flatten nested dictionaries to dotted keys; lists stay whole."""
    return {key: value for key, value in walk(config) if "[" not in key and not isinstance(value, dict)}


def as_list(value: Any) -> list[Any]:
    """Return the items of a list, of a single value, or of None, which has none."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _plain(value: Any) -> str:
    """Write a value in one form: lists and tuples alike, and paths as strings."""
    return json.dumps(value, default=str)
