"""The command `knl`: trains, validates, tests and applies what a configuration file describes.

A subclass of LightningCLI that adds the run directory (`knlightning.run_directory`): it fills in where a run lies and
which checkpoint is meant, and lets the configuration win over what a checkpoint has stored.
"""

import inspect
import json
import logging
import os
import pickle
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from knlightning import __version__
from knlightning.callbacks import (
    CONFIGURED,
    AtomicCheckpointIO,
    BestCheckpoint,
    MetricsCSV,
    PredictionWriter,
    RunConfig,
    TensorBoardLog,
    made_for_every_run,
)
from knlightning.protocols import ChecksBefore
from knlightning.run_directory import checkpoint_in, find_checkpoint, holds_checkpoints, new_run, run_of

RUN_DIR_VARIABLE = "KNL_RUN_DIR"
"""Tells the processes that Lightning starts for further devices where the run lies."""
DEBUG_VARIABLE = "KNL_DEBUG"
"""If set, errors come with their traceback."""

SUBCOMMANDS = {
    "fit": "Train a network; resume with --ckpt_path last.",
    "validate": "Evaluate a checkpoint on the validation data.",
    "test": "Evaluate a checkpoint on the test data.",
    "predict": "Apply a checkpoint to images of your own; writes predictions.csv, or for segmentation predictions/.",
}
OTHER_COMMANDS = {
    "audit-privacy": ("knlightning.privacy.audit", "Check the promises of a private run: bounds, noise, epsilon."),
    "benchmark": ("knlightning.analysis.benchmark", "Measure time and memory beside other normalizations."),
    "export": ("knlightning.export", "Write the network of a checkpoint for other programs."),
    "reproduce": ("knlightning.analysis.reproduce", "List the results of the paper, or train for them again."),
    "sweep-lr": ("knlightning.analysis.sweep", "Search the learning rate, and repeat the best with several seeds."),
}
"""Commands with a parser of their own: the module whose `main` takes their arguments, and what they do."""
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

# What Lightning says at every start, and why nobody needs to act on it
QUIET_WARNINGS = (
    "The '.*_dataloader' does not have many workers",  # images in memory: workers only slow it down
    "The number of training batches .* is smaller than the logging interval",  # every epoch is logged anyway
    r"\s*``instantiate_classes`` was deprecated",  # LightningCLI's own use of jsonargparse
    r"\s*By default only one JsonargparseDeprecationWarning",  # what goes before it
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own use of torch
    "You are using `LearningRateMonitor` callback with models that have no learning rate schedulers",  # is no error
)
QUIET_INFOS = ("litlogger",)  # an advertisement


class KNLightningCLI(LightningCLI):
    """LightningCLI with a directory for each run.

    Args:
        args: command line without the name of the program.
    """

    def __init__(self, args: list[str]) -> None:
        self._args = args
        self.run_dir: Path | None = None  # None: neither needed nor given
        self._name = "run"
        self._first_step = 0
        self._published: Path | None = None  # weights alone, as published
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=None,  # RunConfig instead
            seed_everything_default=0,
            trainer_defaults={"use_distributed_sampler": False},  # would replace a datamodule's own samplers
            parser_kwargs={"prog": "knl", "description": "Train kernel normalized networks, and use them."},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,  # the tasks take them as arguments
            load_from_checkpoint_support=False,  # would store a second configuration in the checkpoint
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Name the subcommands, and the arguments of the trainer's methods that the command line does not offer."""
        return {name: set(inspect.signature(getattr(Trainer, name)).parameters) - {"self"} for name in SUBCOMMANDS}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments in the order of their importance: the trainer's many come last."""
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
        for key, group in (parser.groups or {}).items():
            group.title = TITLES.get(key, group.title)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Add the subcommands, with texts of our own."""
        self._subcommand_parsers: dict[str, LightningArgumentParser] = {}
        commands = parser.add_subcommands()
        asked_for = [name for name in SUBCOMMANDS if name in self._args] or SUBCOMMANDS
        for name, text in SUBCOMMANDS.items():
            if name in asked_for:  # the others are for the list alone, and many arguments take long to add
                usage = f"knl {name} --config FILE [--key value ...]"
                subparser = self._prepare_subcommand_parser(Trainer, name, description=text, usage=usage)
            else:
                subparser = LightningArgumentParser()
            self._subcommand_parsers[name] = subparser
            commands.add_subcommand(name, subparser, help=text)
        for name, (_, text) in OTHER_COMMANDS.items():
            # For the list alone: `main` hands these commands on before the parsers are built.
            commands.add_subcommand(name, LightningArgumentParser(), help=text)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Find the run and its checkpoint; what a checkpoint has stored is shown where it differs, not used."""
        config = self.config[self.config.subcommand]
        name = Path(str(config.config[-1])).stem if config.config else "run"
        launched = int(os.environ.get("LOCAL_RANK", 0)) > 0 and os.environ.get(RUN_DIR_VARIABLE)
        asked = config.run_dir or launched
        run = Path(asked) if asked else None
        if config.ckpt_path is not None:
            checkpoint = find_checkpoint(config.ckpt_path, run, name)
            config.ckpt_path = str(checkpoint)
            self._compare(checkpoint)
            run = run or (run_of(checkpoint) if self._published is None else None)
        elif self.config.subcommand != "fit":
            _say("No --ckpt_path: the weights are those the model is made with, before any training.")
        elif run and holds_checkpoints(run) and not launched:
            raise ValueError(
                f"--run_dir {run} holds the checkpoints of a run: go on with it by --ckpt_path last, or choose another"
                " directory"
            )
        self.run_dir = run
        self._name = name

    def _use_published(self, checkpoint: Path) -> None:
        """Leave the weights of a checkpoint that is not of a run to `_load_published`."""
        subcommand = self.config.subcommand
        if subcommand == "fit":
            raise ValueError(
                f"--ckpt_path {checkpoint} holds weights alone, and no run that could go on: use it with knl validate,"
                " test, predict or export"
            )
        self._published, self.config[subcommand].ckpt_path = checkpoint, None

    def _load_published(self) -> None:
        """Bring published weights, if they are asked for, into the network."""
        if self._published is None:
            return
        from knlightning.models import KNResNet, load_norm_torch_weights  # here: `knl --help` does without

        backbone = getattr(self.model, "backbone", None)
        if not isinstance(backbone, KNResNet):
            raise ValueError(
                f"--ckpt_path {self._published} holds weights alone, which can be those of a published"
                " knlightning.models.knresnet18, 34 or 50; model.init_args.backbone is another network, a"
                f" {type(backbone).__name__}"
            )
        load_norm_torch_weights(backbone, self._published)
        _say(f"{self._published} holds published weights, without a run; all else is as configured.")

    def _make_run(self) -> None:
        """Settle where the run lies: not before the configuration has proved good, so as not to leave empty ones."""
        if self.run_dir is None and self.subcommand in ("fit", "predict"):
            launchers = (TorchElasticEnvironment, SLURMEnvironment)
            if any(launcher.detect() and launcher().world_size() > 1 for launcher in launchers):
                raise ValueError(
                    "--run_dir is needed where torchrun or SLURM starts the processes: they cannot agree on a new one"
                )
            self.run_dir = new_run(self._name)
        if self.run_dir is not None:
            self.config[self.subcommand].run_dir = os.environ[RUN_DIR_VARIABLE] = str(self.run_dir)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, with what every run has: seeds, logs and checkpoints in the run directory."""
        self._load_published()
        self._make_run()
        trainer = self.config_init[self.subcommand].trainer
        text, plain = self._dumped()
        if trainer.logger in (None, True):
            trainer.logger = self._loggers() if self.subcommand == "fit" else False
        trainer.callbacks = [
            *made_for_every_run(text, plain, has_logger=bool(trainer.logger)),
            *_as_list(trainer.callbacks),
        ]
        trainer.plugins = _as_list(trainer.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in trainer.plugins):
            trainer.plugins.append(AtomicCheckpointIO())
        root = None if self.run_dir is None else str(self.run_dir)
        return super().instantiate_trainer(default_root_dir=root, enable_autolog_hparams=False, **kwargs)

    def before_fit(self) -> None:
        """Let callbacks refuse a run before it reads any data."""
        try:
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined] # set where mypy does not look
                if isinstance(callback, ChecksBefore):
                    callback.check_before(self.trainer, self.model, self.datamodule)
        except ValueError:
            if self.run_dir is not None:
                with suppress(OSError):  # unless it is empty
                    self.run_dir.rmdir()
            raise

    def after_fit(self) -> None:
        """Say where the run lies, how well it went, and what to do next."""
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined] # set where mypy does not look
            return
        lines = [f"Run:        {self.run_dir}"]
        best: BestCheckpoint = self._get(self.config_init, "best_checkpoint")
        if best.best_model_path:
            epoch = torch.load(best.best_model_path, map_location="meta", weights_only=True)["epoch"]
            lines.append(f"Best:       {best.monitor} {best.best_model_score:.4f}, in epoch {epoch}")
            lines.append(f"Test it:    knl test --config {self.run_dir}/config.yaml --ckpt_path best")
        lines.append(f"Look at it: tensorboard --logdir {self.run_dir}")
        _say("\n".join(lines))

    def after_predict(self) -> None:
        """Say where the predictions lie."""
        writer: PredictionWriter = self._get(self.config_init, "predictions")
        _say(f"Predictions of {writer.rows} images: {writer.path}")

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the subcommand; if Ctrl-C ends it, say how to go on."""
        try:
            super()._run_subcommand(subcommand)
        except SystemExit:
            if not self.trainer.interrupted:
                raise
            message = "Interrupted."
            if subcommand == "fit" and self.run_dir and checkpoint_in(self.run_dir, "last").is_file():
                message += f" Go on with: knl fit --config {self.run_dir}/config.yaml --ckpt_path last"
            elif subcommand == "fit":
                message += " There is no checkpoint yet to go on from."
            _say(message)
            raise SystemExit(130) from None

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand) | {"ckpt_path": self.config[subcommand].ckpt_path}
        return kwargs | {"return_predictions": False} if subcommand == "predict" else kwargs

    def _loggers(self) -> list[Logger]:
        assert self.run_dir is not None
        return [TensorBoardLog(self.run_dir, self._first_step), MetricsCSV(self.run_dir, self._first_step)]

    def _dumped(self) -> tuple[str, dict[str, Any]]:
        """Return the configuration, as YAML and as plain values, without the checkpoint it starts from."""
        config = self.config[self.config.subcommand].clone()
        config.ckpt_path = None  # the next run with this configuration says so itself
        parser = self._parser(self.config.subcommand)
        plain = json.loads(parser.dump(config, skip_unset=False, format="json"))
        return VERSIONS + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), plain

    def _compare(self, checkpoint: Path) -> None:
        """Print where the configuration differs from that of a checkpoint; the configuration counts."""
        try:
            stored = torch.load(checkpoint, map_location="meta", weights_only=True)
            if _holds_weights_alone(stored):
                self._use_published(checkpoint)
                return
            self._first_step = stored["global_step"]
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
            raise ValueError(f"{checkpoint} is damaged, or not a checkpoint of a run: {error}") from error
        before = _flat(RunConfig.stored_in(stored))
        config = self.config[self.config.subcommand]
        if config.seed_everything is True and "seed_everything" in before:  # "any seed": then the same one again
            config.seed_everything = before["seed_everything"]
        now = _flat(self._dumped()[1])
        differing = [key for key in {**before, **now} if before and before.get(key) != now.get(key)]
        lines = [
            f"  {key}: {before.get(key, 'not set')} -> {now.get(key, 'not set')}"
            for key in differing
            if key != "run_dir"
        ]
        if lines:
            _say(f"Differs from what {checkpoint} was trained with (checkpoint -> used now):\n" + "\n".join(lines))


def run(args: list[str], cli: type[KNLightningCLI] = KNLightningCLI) -> KNLightningCLI:
    """Do what a command line asks for, without what Lightning says at every start.

    Args:
        args: command line without the name of the program.
        cli: parses and runs it.

    Returns:
        What has been built and run: `trainer`, `model`, `datamodule`.
    """
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_news)
    with warnings.catch_warnings():
        for message in QUIET_WARNINGS:
            warnings.filterwarnings("ignore", message)
        return cli(args)


def main(args: list[str] | None = None) -> None:
    """Run the command `knl`.

    Args:
        args: command line without the name of the program; None for that of the process.

    Raises:
        SystemExit: with status 2 if the configuration or the data are at fault, 130 if interrupted.
    """
    args = sys.argv[1:] if args is None else args
    with plain_errors("knl"):
        if args and args[0] in OTHER_COMMANDS:
            module = import_module(OTHER_COMMANDS[args[0]][0])  # here: it may draw, which the others do not need
            module.main(args[1:])
        else:
            run(args)


@contextmanager
def plain_errors(prog: str) -> Iterator[None]:
    """Turn errors of which the configuration or the data are the cause into a message and an exit status.

    Args:
        prog: name of the command.

    Raises:
        SystemExit: with status 2 in place of such an error, 130 in place of an interrupt.
    """
    try:
        yield
    except (ValueError, OSError, ArithmeticError, MisconfigurationException, RuntimeError) as error:
        foreign = isinstance(error, RuntimeError) and "loading state_dict" not in str(error)
        if foreign or os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"{prog}: error: {error}\n({DEBUG_VARIABLE}=1 shows where)", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _holds_weights_alone(stored: Any) -> bool:
    """Say whether what a file holds is no checkpoint of a run but a state dict, by itself or under "model"."""
    if not isinstance(stored, dict) or "global_step" in stored:
        return False
    state = stored.get("model", stored)
    return isinstance(state, dict) and bool(state) and all(isinstance(value, torch.Tensor) for value in state.values())


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


@rank_zero_only
def _say(message: str) -> None:
    print(message, flush=True)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in QUIET_INFOS)


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries to dotted keys."""
    if not isinstance(config, dict):
        return {prefix: config}
    return {
        name: value
        for key, inner in config.items()
        for name, value in _flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()
    }


if __name__ == "__main__":
    main()
