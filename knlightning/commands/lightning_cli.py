"""What the commands `fit`, `validate`, `test`, `predict`, `export` and `audit-privacy` share.

A subclass of LightningCLI that adds the run directory (`knlightning.run_directory`) and lets the configuration win over
what a checkpoint has stored. It uses the documented form `run=False`, with a parser and a file for each command.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import CheckpointIO

from knlightning import __version__
from knlightning.callbacks import CONFIGURED, AtomicCheckpointIO, made_for_every_run
from knlightning.callbacks.signals import Stopped, stopped_by_signals
from knlightning.checkpoint_files import check_checkpoint, holds_weights_alone, plain_config, read_checkpoint
from knlightning.commands.arguments import as_list, flatten
from knlightning.commands.claim import Claim
from knlightning.commands.early import OPTIONS, USAGES
from knlightning.commands.errors import locate
from knlightning.commands.help import explain
from knlightning.commands.names import complete_names
from knlightning.commands.num_classes import take_from_data
from knlightning.commands.output import say
from knlightning.commands.parser import RunArgumentParser
from knlightning.commands.paths import config_first, expand_paths
from knlightning.commands.peers import PeerLost, Peers
from knlightning.commands.published import load_published
from knlightning.commands.quiet import quiet
from knlightning.commands.ranges import check_lightning_arguments, check_parsed
from knlightning.commands.yaml_text import read_yaml_strictly
from knlightning.internals.lightning import is_restoring
from knlightning.models.norm_torch import IMAGENET
from knlightning.run_directory import NAMED_CHECKPOINTS, find_checkpoint, run_of
from knlightning.tasks.fine_tuning import weights_follow
from knlightning.text import printable

RUN_DIR_VARIABLE = "KNL_RUN_DIR"
"""Tells the processes that Lightning starts for further devices where the run lies."""
VERSIONS = f"# knlightning {__version__}, lightning {lightning.__version__}, torch {torch.__version__}\n"
"""Stands above the configuration in a run directory."""
TRAINER_DEFAULTS = {"use_distributed_sampler": False, "enable_model_summary": False}
"""A distributed sampler would replace a datamodule's own samplers; the callback Summary replaces Lightning's."""
SETTLED = {"barebones", "default_root_dir", "enable_autolog_hparams", "enable_checkpointing", "model_registry"}
"""Arguments of the trainer that the run directory settles, or that have no meaning here."""

NO_DIFFERENCE = ("run_dir", "data.init_args.predict_dir", "predictions.")
"""Beginnings of keys that only say what is predicted, and where and how it is written."""


class KNLightningCLI(LightningCLI):
    """LightningCLI with a directory for each run: parses a command line, makes what it describes, and executes it.

    Args:
        args: Command line without the names of the program and of the command.

    Attributes:
        command: Name of the command.
        usage: Its most important arguments.
        starts_runs: Whether a new run directory is made if none is given.
        trains: Whether checkpoints are written into it.
        own_arguments: Arguments of this command that do not belong to the configuration of a run.
        peers: The processes that torchrun or SLURM has started with this one; None if it is alone.
        run_dir: Directory of the run; None if it is neither needed nor given.
        checkpoint: The checkpoint of a run that is asked for; None if there is none.
    """

    command: ClassVar[str]
    usage: ClassVar[str] = USAGES["fit"]
    starts_runs: bool = False
    trains: ClassVar[bool] = False
    own_arguments: ClassVar[tuple[str, ...]] = ()

    def __init__(self, args: list[str]) -> None:
        self.run_dir: Path | None = None
        self.checkpoint: Path | None = None
        self.first_step = 0
        self.peers: Peers | None = None
        self._published: str | None = None  # weights alone
        read_yaml_strictly()
        self.claim = Claim()
        with quiet(), stopped_by_signals(), self._run_in_order(), self._paths_in_errors():
            super().__init__(
                LightningModule,
                LightningDataModule,
                save_config_callback=None,  # RunConfig instead
                seed_everything_default=0,
                trainer_defaults=TRAINER_DEFAULTS,
                parser_class=RunArgumentParser,
                parser_kwargs={
                    "prog": f"knl {self.command}",
                    "description": sys.modules[type(self).__module__].__doc__,
                    "usage": f"knl {self.command} {self.usage}",
                    "allow_abbrev": False,
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
        """Do what the command is for, with `trainer`, `model` and `datamodule`; each command says how."""

    def add_own_arguments(self, parser: LightningArgumentParser) -> None:
        """Add arguments of this command, before those of every run."""

    def check_own_arguments(self) -> None:
        """Check the arguments of this command, before a checkpoint is looked for."""

    def without_checkpoint(self, launched: bool) -> None:
        """React to a command line without a checkpoint.

        Args:
            launched: Whether Lightning has started this process for a further device.
        """
        say("No --ckpt_path (such as best): the weights are those the model is made with, before any training.")

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments in the order of their importance: the trainer's many come last."""
        self.add_own_arguments(parser)
        parser.add_argument("--run_dir", type=str | None, default=None, help=OPTIONS["run_dir"])
        parser.add_argument("--ckpt_path", type=str | None, default=None, help=OPTIONS["ckpt_path"])
        parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
        for key, (callback, _) in CONFIGURED.items():
            parser.add_lightning_class_args(callback, key)
        parser.add_class_arguments(
            Trainer, "trainer", instantiate=False, fail_untyped=False, sub_configs=True, skip=SETTLED
        )
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})
        explain(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line, and find the run and its checkpoint."""
        config = parser.parse_args(complete_names(config_first(args)))
        check_parsed(parser, config, ("trainer", *CONFIGURED))
        self.config = config
        check_lightning_arguments(config.seed_everything, vars(config.trainer))
        expand_paths(config)
        self.check_own_arguments()
        launched = int(os.environ.get("LOCAL_RANK", 0)) > 0 and os.environ.get(RUN_DIR_VARIABLE)
        if given := config.run_dir or launched:
            self.run_dir = Path(given)
        config.ckpt_path = self.settle_checkpoint(config.ckpt_path)
        if config.ckpt_path is None:
            self._lock()
            self.without_checkpoint(bool(launched))
            return
        if config.ckpt_path == IMAGENET or config.ckpt_path.endswith(".safetensors"):
            self.use_published(config.ckpt_path)
            return
        checkpoint = find_checkpoint(config.ckpt_path, self.run_dir, self._run_name)
        if config.ckpt_path in NAMED_CHECKPOINTS:  # another file is only read: what is written goes into a new run
            self.run_dir = self.run_dir or run_of(checkpoint)
        self._lock()
        stored = read_checkpoint(checkpoint, map_location="meta")
        if holds_weights_alone(stored):
            self.use_published(str(checkpoint))
            return
        check_checkpoint(checkpoint, stored, to_resume=self.trains)
        self.first_step = stored["global_step"]
        self._show_differences(checkpoint, plain_config(checkpoint, stored))
        self.checkpoint = checkpoint
        say(f"Restoring {checkpoint}, of epoch {stored['epoch']}.")

    def instantiate_classes(self) -> None:
        """Make what the configuration describes, and load weights alone; those of a checkpoint follow later."""
        take_from_data(self.parser, self.config)  # the number of classes
        with weights_follow() if self.checkpoint or self._published else nullcontext():
            super().instantiate_classes()
        if self._published:
            load_published(self.model, self._published)

    def settle_checkpoint(self, ckpt_path: str | None) -> str | None:
        """Settle what `--ckpt_path` means where that depends on what is there.

        Args:
            ckpt_path: As given.

        Returns:
            "last", "best", the path of a file, or None.
        """
        return ckpt_path

    def use_published(self, weights: str) -> None:
        """Take what is no checkpoint of a run for weights alone, which are loaded into the new model.

        Args:
            weights: The file, or the name of published weights.
        """
        self._published = weights

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, with what every run has: seeds, logs and checkpoints in the run directory."""
        self._make_run()
        trainer = self.config_init.trainer
        text, plain = self._dumped()
        trainer.logger = self.loggers(trainer.logger)
        trainer.callbacks = [
            *made_for_every_run(text, plain, bool(trainer.logger), callbacks := as_list(trainer.callbacks)),
            *callbacks,
        ]
        trainer.plugins = as_list(trainer.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in trainer.plugins):
            trainer.plugins.append(AtomicCheckpointIO())
        root = None if self.run_dir is None else str(self.run_dir)
        return super().instantiate_trainer(default_root_dir=root, enable_autolog_hparams=False, **kwargs)

    def loggers(self, configured: Any) -> list[Logger] | bool:
        """Return the loggers of the trainer.

        Args:
            configured: Those of the configuration: None or True if it leaves the choice, False for none.
        """
        return False if configured in (None, True) else configured

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
        """Execute the command; if Ctrl-C or another signal ends it, say so."""
        try:
            self.execute()
        except Stopped as stop:
            with suppress(OSError):  # nobody may be there to read it
                say(f"Stopped by {stop.signum.name}.{self.how_to_go_on()}")
            raise
        except SystemExit as end:  # which the trainer makes of it
            # of export there is no trainer
            if isinstance(end, PeerLost) or not getattr(self.trainer, "interrupted", False):
                raise
            say(f"Interrupted.{self.how_to_go_on()}")
            raise SystemExit(130) from None
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if self.checkpoint is None or not isinstance(self.trainer, Trainer) or not is_restoring(self.trainer):
                raise
            what = f"does not fit this configuration, or is damaged: {type(error).__name__}: {error}"
            raise ValueError(f"{self.checkpoint} {what}") from None

    @property
    def _run_name(self) -> str:
        files = self.config.config
        return Path(str(files[-1])).stem if files else "run"

    def _make_run(self) -> None:
        """Settle where the run lies: not before the configuration has proved good, so as not to leave empty ones."""
        self.peers = Peers.found() if self.trains else None
        if self.run_dir is None and self.starts_runs:
            make = partial(self.claim.make, None, self._run_name)
            self.run_dir = self.peers.agree(make) if self.peers else make()
            self._lock()
        elif self.run_dir is not None and self.starts_runs and not self.run_dir.is_dir():
            self.run_dir = self.claim.make(self.run_dir, self._run_name)
            self._lock()
        if self.run_dir is not None:
            self.config.run_dir = os.environ[RUN_DIR_VARIABLE] = str(self.run_dir)

    def _lock(self) -> None:
        """Keep other processes from training in the same run."""
        if self.trains and self.run_dir is not None:
            self.claim.lock(self.run_dir)

    @contextmanager
    def _run_in_order(self) -> Iterator[None]:
        """Give the run up at the end; leave none behind in which nothing was trained."""
        try:
            yield
        except BaseException:
            trained = getattr(getattr(self, "trainer", None), "global_step", 0) > self.first_step
            if not trained:
                self.claim.discard(with_content=self.trains)
            raise
        finally:
            self.claim.release()

    def _dumped(self) -> tuple[str, dict[str, Any]]:
        """Return the configuration, as YAML and as plain values, without what belongs to this command line alone."""
        config = self.config.clone()
        for name in ("ckpt_path", *self.own_arguments):
            config[name] = None
        plain = self._plain(config)
        return VERSIONS + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), plain

    def _plain(self, config: Namespace) -> dict[str, Any]:
        """Write a configuration in plain values."""
        try:
            plain: dict[str, Any] = json.loads(self.parser.dump(config, skip_unset=False, format="json"))
        except ValueError as error:  # such as for the default of Lightning's Timer
            reason = next((line.strip(" -") for line in str(error).splitlines() if "cannot represent" in line), error)
            hint = "Give the argument that has this value, in words"
            raise ValueError(f"the configuration cannot be written into config.yaml: {reason}. {hint}") from error
        return plain

    def _show_differences(self, checkpoint: Path, stored: dict[str, Any]) -> None:
        """Print where the configuration differs from that of a checkpoint; the configuration counts."""
        before = flatten(stored)
        if self.config.seed_everything is True and "seed_everything" in before:  # "any seed": then the same one again
            self.config.seed_everything = before["seed_everything"]
        now = flatten(self._dumped()[1])
        lines = [
            printable(f"  {key}: {before.get(key, 'not set')} -> {now.get(key, 'not set')}")
            for key in {**before, **now}
            if before and before.get(key) != now.get(key) and not key.startswith(NO_DIFFERENCE)
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
