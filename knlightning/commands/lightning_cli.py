"""What the commands `fit`, `validate`, `test`, `predict`, `export` and `audit-privacy` share.

A subclass of LightningCLI that adds the run directory (`knlightning.run_directory`): it fills in where a run lies and
which checkpoint is meant, and lets the configuration win over what a checkpoint has stored. It uses LightningCLI's
documented form `run=False`, with a parser for each command; each command has a file that says what is special to it.
"""

import json
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import lightning
import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import CheckpointIO

from knlightning import __version__
from knlightning.callbacks import CONFIGURED, AtomicCheckpointIO, RunConfig, made_for_every_run
from knlightning.commands.arguments import flatten
from knlightning.commands.errors import locate
from knlightning.commands.output import say
from knlightning.commands.quiet import quiet
from knlightning.commands.ranges import check_groups, check_lightning_arguments
from knlightning.commands.yaml_text import NamesFiles, read_yaml_strictly
from knlightning.internals.jsonargparse import set_titles
from knlightning.models import KNResNet, load_norm_torch_weights
from knlightning.run_directory import find_checkpoint, new_run, run_of

RUN_DIR_VARIABLE = "KNL_RUN_DIR"
"""Tells the processes that Lightning starts for further devices where the run lies."""
TITLES = {
    "model": "Task and network (knl fit --model.help knlightning.tasks.ClassificationTask, or SegmentationTask)",
    "data": "Data (knl fit --data.help knlightning.data.DigitsDataModule)",
    "trainer": "Lightning's trainer",
    **{key: title for key, (_, title) in CONFIGURED.items()},
}
VERSIONS = f"# knlightning {__version__}, lightning {lightning.__version__}, torch {torch.__version__}\n"
"""Stands above the configuration in a run directory."""
SETTLED = {"barebones", "default_root_dir", "enable_autolog_hparams", "enable_checkpointing", "model_registry"}
"""Arguments of the trainer that the run directory settles, or that have no meaning here."""


class RunArgumentParser(NamesFiles, LightningArgumentParser):
    """LightningArgumentParser whose errors name the file."""


class KNLightningCLI(LightningCLI):
    """LightningCLI with a directory for each run: parses a command line, makes what it describes, and executes it.

    Args:
        args: Command line without the names of the program and of the command.

    Attributes:
        command: Name of the command.
        usage: Its most important arguments.
        starts_runs: Whether a new run directory is made if none is given.
        own_arguments: Arguments of this command that do not belong to the configuration of a run.
        run_dir: Directory of the run; None if it is neither needed nor given.
        checkpoint: The checkpoint of a run that is asked for; None if there is none.
    """

    command: ClassVar[str]
    usage: ClassVar[str] = "--config FILE [--key value ...]"
    starts_runs: ClassVar[bool] = False
    own_arguments: ClassVar[tuple[str, ...]] = ()

    def __init__(self, args: list[str]) -> None:
        self.run_dir: Path | None = None
        self.checkpoint: Path | None = None
        self.first_step = 0
        self._published: Path | None = None  # weights alone, as published
        read_yaml_strictly()
        with quiet(), self._paths_in_errors():
            super().__init__(
                LightningModule,
                LightningDataModule,
                save_config_callback=None,  # RunConfig instead
                seed_everything_default=0,
                trainer_defaults={"use_distributed_sampler": False},  # would replace a datamodule's own samplers
                parser_class=RunArgumentParser,
                parser_kwargs={
                    "prog": f"knl {self.command}",
                    "description": sys.modules[type(self).__module__].__doc__,
                    "usage": f"knl {self.command} {self.usage}",
                },
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,  # the tasks take them as arguments
                load_from_checkpoint_support=False,  # would store a second configuration in the checkpoint
                run=False,
                args=args,
            )
            self._execute()

    def execute(self) -> None:
        """Do what the command is for, with `trainer`, `model` and `datamodule`."""
        raise NotImplementedError

    def add_own_arguments(self, parser: LightningArgumentParser) -> None:
        """Add arguments of this command, before those of every run."""

    def check_own_arguments(self) -> None:
        """Check the arguments of this command, before a checkpoint is looked for."""

    def without_checkpoint(self, launched: bool) -> None:
        """React to a command line without a checkpoint.

        Args:
            launched: Whether Lightning has started this process for a further device.
        """
        say("No --ckpt_path: the weights are those the model is made with, before any training.")

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments in the order of their importance: the trainer's many come last."""
        self.add_own_arguments(parser)
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Directory of the run; null for runs/<name of the config file>/<number>.",
        )
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="Checkpoint to start from: 'last' or 'best' of the run (of the newest one, if run_dir is not"
            " given), or the path of a file, which may be one of the published ImageNet weights.",
        )
        parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
        for key, (callback, _) in CONFIGURED.items():
            parser.add_lightning_class_args(callback, key)
        parser.add_class_arguments(
            Trainer, "trainer", instantiate=False, fail_untyped=False, sub_configs=True, skip=SETTLED
        )
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})
        set_titles(parser, TITLES)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line, and find the run and its checkpoint."""
        config = parser.parse_args(args)
        check_groups(config, parser.get_defaults(), ("trainer", *CONFIGURED))
        self.config = config
        check_lightning_arguments(config.seed_everything, vars(config.trainer))
        self.check_own_arguments()
        launched = int(os.environ.get("LOCAL_RANK", 0)) > 0 and os.environ.get(RUN_DIR_VARIABLE)
        if given := config.run_dir or launched:
            self.run_dir = Path(given)
        if config.ckpt_path is None:
            self.without_checkpoint(bool(launched))
            return
        checkpoint = find_checkpoint(config.ckpt_path, self.run_dir, self._run_name)
        stored = _read_without_weights(checkpoint)
        if _holds_weights_alone(stored):
            self.use_published(checkpoint)
            return
        self.first_step = stored["global_step"]
        self._show_differences(checkpoint, RunConfig.stored_in(stored))
        self.checkpoint, self.run_dir = checkpoint, self.run_dir or run_of(checkpoint)

    def use_published(self, weights: Path) -> None:
        """Take a file that is no checkpoint of a run for published weights, which are loaded into the new model.

        Args:
            weights: The file.
        """
        self._published = weights

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, with what every run has: seeds, logs and checkpoints in the run directory."""
        self.load_published()
        self._make_run()
        trainer = self.config_init.trainer
        text, plain = self._dumped()
        if trainer.logger in (None, True):
            trainer.logger = self.default_loggers()
        trainer.callbacks = [
            *made_for_every_run(text, plain, has_logger=bool(trainer.logger)),
            *as_list(trainer.callbacks),
        ]
        trainer.plugins = as_list(trainer.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in trainer.plugins):
            trainer.plugins.append(AtomicCheckpointIO())
        root = None if self.run_dir is None else str(self.run_dir)
        return super().instantiate_trainer(default_root_dir=root, enable_autolog_hparams=False, **kwargs)

    def default_loggers(self) -> list[Logger] | bool:
        """Return the loggers of a trainer for which the configuration names none."""
        return False

    def load_published(self) -> None:
        """Bring published weights, if they are asked for, into the network."""
        if self._published is None:
            return
        backbone = getattr(self.model, "backbone", None)
        if not isinstance(backbone, KNResNet):
            raise ValueError(
                f"--ckpt_path {self._published} holds weights alone, which can be those of a published"
                " knlightning.models.knresnet18, 34 or 50; model.init_args.backbone is another network, a"
                f" {type(backbone).__name__}"
            )
        load_norm_torch_weights(backbone, self._published)
        say(f"{self._published} holds published weights, without a run; all else is as configured.")

    def trainer_arguments(self) -> dict[str, Any]:
        """Return the arguments that the trainer's methods `fit`, `validate`, `test` and `predict` share."""
        return {
            "model": self.model,
            "datamodule": self.datamodule,
            "ckpt_path": None if self.checkpoint is None else str(self.checkpoint),
        }

    def how_to_go_on(self) -> str:
        """Say what to do after an interruption."""
        return ""

    def _execute(self) -> None:
        """Execute the command; if Ctrl-C ends it, say so."""
        try:
            self.execute()
        except SystemExit:  # which the trainer makes of it
            if not getattr(self.trainer, "interrupted", False):  # of export there is no trainer
                raise
            say(f"Interrupted.{self.how_to_go_on()}")
            raise SystemExit(130) from None

    @property
    def _run_name(self) -> str:
        files = self.config.config
        return Path(str(files[-1])).stem if files else "run"

    def _make_run(self) -> None:
        """Settle where the run lies: not before the configuration has proved good, so as not to leave empty ones."""
        if self.run_dir is None and self.starts_runs:
            launchers = (TorchElasticEnvironment, SLURMEnvironment)
            if any(launcher.detect() and launcher().world_size() > 1 for launcher in launchers):
                raise ValueError(
                    "--run_dir is needed where torchrun or SLURM starts the processes: they cannot agree on a new one"
                )
            self.run_dir = new_run(self._run_name)
        if self.run_dir is not None:
            self.config.run_dir = os.environ[RUN_DIR_VARIABLE] = str(self.run_dir)

    def _dumped(self) -> tuple[str, dict[str, Any]]:
        """Return the configuration, as YAML and as plain values, without what belongs to this command line alone."""
        config = self.config.clone()
        for name in ("ckpt_path", *self.own_arguments):
            config[name] = None
        plain = self._plain(config)
        return VERSIONS + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), plain

    def _plain(self, config: Namespace) -> dict[str, Any]:
        """Write a configuration in plain values."""
        plain: dict[str, Any] = json.loads(self.parser.dump(config, skip_unset=False, format="json"))
        return plain

    def _show_differences(self, checkpoint: Path, stored: dict[str, Any]) -> None:
        """Print where the configuration differs from that of a checkpoint; the configuration counts."""
        before = flatten(stored)
        if self.config.seed_everything is True and "seed_everything" in before:  # "any seed": then the same one again
            self.config.seed_everything = before["seed_everything"]
        now = flatten(self._dumped()[1])
        lines = [
            f"  {key}: {before.get(key, 'not set')} -> {now.get(key, 'not set')}"
            for key in {**before, **now}
            if before and before.get(key) != now.get(key) and key != "run_dir"
        ]
        if lines:
            say(f"Differs from what {checkpoint} was trained with (checkpoint -> used now):\n" + "\n".join(lines))

    @contextmanager
    def _paths_in_errors(self) -> Iterator[None]:
        """Let errors of the configuration name their key."""
        try:
            yield
        except Exception as error:
            located = locate(error, self._plain(self.config)) if hasattr(self, "config") else error
            if located is error:
                raise
            raise located from error


def as_list(value: Any) -> list[Any]:
    """Return the items of a list, of a single value, or of None, which has none."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _read_without_weights(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint, without the values of its tensors."""
    try:
        stored = torch.load(checkpoint, map_location="meta", weights_only=True)
        if not _holds_weights_alone(stored):
            stored["global_step"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint} is damaged, or not a checkpoint of a run: {error}") from error
    return stored


def _holds_weights_alone(stored: Any) -> bool:
    """Say whether what a file holds is no checkpoint of a run but a state dict, by itself or under "model"."""
    if not isinstance(stored, dict) or "global_step" in stored:
        return False
    state = stored.get("model", stored)
    return isinstance(state, dict) and bool(state) and all(isinstance(value, torch.Tensor) for value in state.values())
