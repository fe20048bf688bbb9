"""The parser of the commands that read the configuration of a run."""

from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from knlightning.commands.yaml_text import NamesFiles
from knlightning.run_directory import run_of_config


class RunArgumentParser(NamesFiles, LightningArgumentParser):
    """LightningArgumentParser whose errors name the file, and for which a run's `config.yaml` means where it lies.

    Arguments are those of `LightningArgumentParser`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._started_in = Path.cwd()

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Read a configuration file, be it named on the command line or, as `config`, in another file."""
        config: Namespace = super().parse_path(path, *args, **kwargs)
        if run := run_of_config(Path(path)):
            # another file is read from within its folder
            config.run_dir = str(run if Path.cwd() == self._started_in else run.absolute())
        return config
