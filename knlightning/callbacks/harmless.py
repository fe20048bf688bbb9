"""What a run can do without: it may fail, and the run goes on."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from knlightning.text import printable


class Harmless:
    """Let pictures and logs fail without ending a run. Each is warned of once, with the reason."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Turn any error of the block into a warning that names what the block makes."""
        try:
            yield
        except Exception as error:
            self.warn(what, f"{type(error).__name__}: {error}")

    def warn(self, what: str, reason: str) -> None:
        """Warn that something is not made, unless that was said before."""
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"Left out: {what} ({printable(reason):.500}). The run goes on.", stacklevel=2)
