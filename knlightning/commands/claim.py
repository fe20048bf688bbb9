"""What a command holds of a run while it works: the lock, and the folders that it has made."""

import shutil
from contextlib import ExitStack, suppress
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from knlightning.run_directory import ROOT, locked, make_folder, new_run, sweep


class Claim:
    """A claim to a run directory, of the process of rank zero.

    Attributes:
        made: Folders that were made for the run, that of the run first; empty if it was there.
    """

    def __init__(self) -> None:
        self.made: list[Path] = []
        self._locks = ExitStack()

    def lock(self, run: Path) -> None:
        """Hold a run, if it is there, so that no other process trains in it; remove what killed ones have left.

        Raises:
            BlockingIOError: If another process holds it.
        """
        if getattr(rank_zero_only, "rank", 0) == 0 and run.is_dir():
            self._locks.enter_context(locked(run))
            sweep(run)

    def make(self, run: Path | None, name: str) -> Path:
        """Make the directory of a run.

        Args:
            run: The directory; None for a new one in `runs/NAME`.
            name: Name of the runs.

        Returns:
            The directory.
        """
        folder = ROOT / name if run is None else run
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        if run is None:
            run = new_run(name)
            missing = [run, *missing]
        else:
            make_folder(run)
        self.made = missing
        return run

    def discard(self, with_content: bool) -> None:
        """Remove the directory of the run, if it was made for this command.

        Args:
            with_content: Whether it is removed if something was written into it.
        """
        self.release()
        if not self.made:
            return
        run, *others = self.made
        if with_content:
            shutil.rmtree(run, ignore_errors=True)
        with suppress(OSError):  # a folder in which something lies stays
            for path in (run, *others):
                if path.exists():
                    path.rmdir()
        self.made = []

    def release(self) -> None:
        """Let others have the run."""
        self._locks.close()
