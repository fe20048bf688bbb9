"""The configuration of a run, kept beside its results."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from knlightning.run_directory import replacing


class RunConfig(Callback):
    """Write the whole configuration to `config.yaml` in the run directory, and into every checkpoint.

    A resumed run overwrites the file with the configuration it uses. (Lightning's SaveConfigCallback refuses to start
    if the file exists.)

    Args:
        text: The configuration in YAML, for the file.
        config: The same as plain values, for the checkpoints.
    """

    def __init__(self, text: str, config: dict[str, Any]) -> None:
        self.text = text
        self.config = config

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file, if the run trains."""
        if stage == "fit" and trainer.is_global_zero:
            with replacing(Path(trainer.default_root_dir) / "config.yaml") as temporary:
                temporary.write_text(self.text)

    def state_dict(self) -> dict[str, Any]:
        """Store the configuration in a checkpoint; it is shown, not used, when a run resumes."""
        return {"config": self.config}

    @staticmethod
    def stored_in(checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return the configuration stored in a checkpoint; empty if there is none."""
        state: dict[str, Any] = checkpoint.get("callbacks", {}).get(RunConfig.__qualname__, {})
        return state.get("config", {})
