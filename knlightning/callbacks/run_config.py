"""The configuration of a run, kept beside its results."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from knlightning.run_directory import CHECKPOINTS, CONFIG, replacing

JOB_VARIABLE = "SLURM_JOB_ID"


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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, now that nothing keeps the run from training."""
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined] # set where mypy does not look
            run = Path(trainer.default_root_dir)
            (run / CHECKPOINTS).mkdir(parents=True, exist_ok=True)  # by which the file is known for that of a run
            with replacing(run / CONFIG) as temporary:
                temporary.write_text(self.text)

    def change(self, keys: Sequence[str], value: Any) -> None:
        """Change a value of the configuration, before training starts.

        Args:
            keys: Where it stands, such as ("data", "init_args", "batch_size").
            value: The value.

        Raises:
            KeyError: If there is no such place.
        """
        place = self.config
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        comment = "".join(line for line in self.text.splitlines(keepends=True) if line.startswith("#"))
        self.text = comment + yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)

    def state_dict(self) -> dict[str, Any]:
        """Store the configuration in a checkpoint; it is shown, not used, when a run resumes.

        On a cluster with SLURM the number of the job is stored too: that of a requeued job is the same.
        """
        job = os.environ.get(JOB_VARIABLE)
        return {"config": self.config} if job is None else {"config": self.config, "job": job}
