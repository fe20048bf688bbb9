"""Checks of arguments, with one form of message: `name must be what is allowed, got value`."""

import math
from collections.abc import Sequence
from numbers import Integral, Real


class ArgumentError(ValueError):
    """An argument is out of its range.

    The message names the argument only; a command adds where it stands in the configuration.

    Args:
        name: Name of the argument.
        value: Its value.
        allowed: What it must be, such as "at least 1".
        hint: A sentence that says how to mend it; may be empty.
    """

    def __init__(self, name: str, value: object, allowed: str, hint: str = "") -> None:
        super().__init__(name, value, allowed, hint)  # all of them, so that the error can be pickled
        self.name, self.value, self.allowed, self.hint = name, value, allowed, hint

    def __str__(self) -> str:
        return f"{self.name} must be {self.allowed}, got {self.value!r}" + (f". {self.hint}" if self.hint else "")


def check(ok: bool, name: str, value: object, allowed: str, hint: str = "") -> None:
    """Check an argument by a condition.

    Args:
        ok: Whether the value is allowed.
        name: Name of the argument.
        value: Its value.
        allowed: What it must be.
        hint: A sentence that says how to mend it; may be empty.

    Raises:
        ArgumentError: If it is not allowed.
    """
    if not ok:
        raise ArgumentError(name, value, allowed, hint)


def check_choice(name: str, value: object, choices: Sequence[object], hint: str = "") -> None:
    """Check that an argument is one of several values.

    Args:
        name: Name of the argument.
        value: Its value.
        choices: What it may be; for a `Literal` its `get_args`.
        hint: A sentence that says how to mend it; may be empty.

    Raises:
        ArgumentError: If it is none of them.
    """
    check(value in choices, name, value, f"one of {', '.join(map(str, choices))}", hint)


FITTING = "a number that fits into 64 bits"
"""What whole numbers must be, for torch."""


def fits(number: int) -> bool:
    """Say whether a number fits into 64 bits."""
    return -(2**63) <= number < 2**63


def check_number(
    name: str,
    value: object,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    integer: bool = False,
    none: str = "",
    hint: str = "",
) -> None:
    """Check that an argument is a finite number in a range; a whole number must fit into 64 bits, as for torch.

    Args:
        name: Name of the argument.
        value: Its value.
        at_least: Lower bound, allowed itself.
        above: Lower bound, not allowed itself.
        at_most: Upper bound, allowed itself.
        below: Upper bound, not allowed itself.
        integer: Whether it must be a whole number.
        none: What None means, if it is allowed, such as "the optimizer's own".
        hint: A sentence that says how to mend it; may be empty.

    Raises:
        ArgumentError: If it is no such number.
    """
    if value is None and none:
        return
    check(not isinstance(value, Integral) or fits(int(value)), name, value, FITTING, hint)
    kind = Integral if integer else Real
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    words = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
    allowed = ("a whole number" if integer else "a number") + (f" {words}" if words else "")
    ok = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    ok = ok and (at_least is None or value >= at_least) and (above is None or value > above)  # type: ignore[operator] # numbers
    ok = ok and (at_most is None or value <= at_most) and (below is None or value < below)  # type: ignore[operator] # numbers
    check(ok, name, value, allowed + (f", or null for {none}" if none else ""), hint)
