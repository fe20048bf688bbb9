"""The command `knl` by its earlier path, for programs that import it; it is in `knlightning.commands.main`."""

from knlightning.commands.main import main

__all__ = ["main"]
