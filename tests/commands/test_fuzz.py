"""Mutated configurations: each one trains a step, or is refused by a message; none ends in a traceback or hangs.

KNL_FUZZ_CONFIGURATIONS is their number, KNL_FUZZ_SEED makes others. With `-n 2` they take two cores.
"""

import contextlib
import copy
import faulthandler
import io
import math
import os
import random
import shutil
import signal
import sys
import traceback
import warnings

import pytest
import torch
import yaml
from standins import PROJECT

from knlightning.commands.arguments import plain_errors, walk
from knlightning.commands.fit import main as fit
from knlightning.commands.main import main

CONFIGURATIONS = int(os.environ.get("KNL_FUZZ_CONFIGURATIONS", "60"))
SHARES = 1 if CONFIGURATIONS < 300 else 4  # so that processes have their share of them
SEED = int(os.environ.get("KNL_FUZZ_SEED", "0"))
SECONDS = 60
"""What a configuration may take; a step takes less than one."""
STEP = ["--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--trainer.logger=false", "--run_dir=run"]
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 2**31, 2**70, -(2**70)),
    *(0.5, -0.5, 1e-308, 1e308, -1e308, math.nan, math.inf, -math.inf),
    *("", "x", "null", "1e3", "~", "$HOME", "../..", "os.system", "a.b.C", "\x1b[31m", "é\n"),
    *([], [0], [1, 2], [None], [math.nan] * 3, {}, {"a": 1}, {"class_path": "os.system"}, {"init_args": {"x": 1}}),
]
CLASSES = {
    "optimizer": [f"torch.optim.{name}" for name in ("Adam", "LBFGS", "SparseAdam", "Rprop", "NAdam", "Optimizer")],
    "lr_scheduler": [
        *(f"torch.optim.lr_scheduler.{name}" for name in ("StepLR", "OneCycleLR", "LambdaLR", "ReduceLROnPlateau")),
        *(f"torch.optim.lr_scheduler.{name}" for name in ("LRScheduler", "CyclicLR", "SequentialLR", "ConstantLR")),
        *("knlightning.tasks.CosineLR", "knlightning.tasks.PolyLR"),
    ],
    "backbone": ["torch.nn.Identity", "torch.nn.Linear", "torchvision.models.resnet18", "knlightning.models.resnet8"],
    "callbacks": [
        *(f"lightning.pytorch.callbacks.{name}" for name in ("LearningRateFinder", "BackboneFinetuning")),
        *(f"lightning.pytorch.callbacks.{name}" for name in ("EarlyStopping", "ModelPruning", "LambdaCallback")),
        *(f"lightning.pytorch.callbacks.{name}" for name in ("StochasticWeightAveraging", "Timer")),
        *("knlightning.callbacks.EMA", "knlightning.privacy.DifferentialPrivacy"),
    ],
    "model": ["knlightning.tasks.SegmentationTask", "knlightning.tasks.Task", "lightning.pytorch.LightningModule"],
    "data": ["knlightning.data.DigitScenesDataModule", "knlightning.data.CIFAR10DataModule", "standins.RandomData"],
}
LEFT_ALONE = {
    *("accelerator", "devices", "num_nodes", "strategy", "plugins", "num_workers", "profiler"),  # start processes
    "compile",  # starts a compiler
    *("max_steps", "limit_val_batches", "logger", "run_dir", "config", "ckpt_path", "print_config"),  # of the command
}


def full(config, capsys):
    """Return a configuration with all defaults."""
    with pytest.raises(SystemExit):
        main(["fit", "--config", config, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def mutate(config, generator):
    """Change one to three values of a configuration; return the text of a file, and the changes."""
    config = copy.deepcopy(config)
    changes = []
    for _ in range(generator.choice([1, 1, 1, 2, 3])):
        key, owner, name = generator.choice([place for place in places(config) if place[2] not in LEFT_ALONE])
        if name in CLASSES and generator.random() < 0.7:
            value = {"class_path": generator.choice(CLASSES[name])}
            value = [value] if name == "callbacks" else value
        elif generator.random() < 0.05:
            del owner[name]
            changes.append((key, "deleted"))
            continue
        elif isinstance(owner[name], bool | float) and generator.random() < 0.5:  # so that many of them train
            value = not owner[name] if isinstance(owner[name], bool) else owner[name] / 2
        else:
            value = generator.choice(VALUES)
        owner[name] = copy.deepcopy(value)
        changes.append((key, value))
    text = yaml.safe_dump(config, allow_unicode=False)
    if generator.random() < 0.05:
        lines = text.splitlines(keepends=True)
        line = generator.randrange(len(lines))
        text = "".join([*lines[: line + 1], *lines[line : line + 1], *lines[line + 1 :]])
        changes.append(("line", line))
    return text, changes


def places(config):
    """List keys, their owners and their names within."""
    for key, value in walk(config):
        if isinstance(value, dict):
            yield from ((f"{key}.{name}", value, name) for name in value)
    yield from ((name, config, name) for name in config)


@contextlib.contextmanager
def time_limit():
    def ring(*_):
        raise BaseException(f"longer than {SECONDS} s")  # none that anybody catches

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    # of code that no signal interrupts
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt():
    """Run a configuration; return whether it trains, and what is wrong with what happens (empty if nothing is)."""
    errors = io.StringIO()
    try:
        with time_limit(), warnings.catch_warnings(), contextlib.redirect_stderr(errors):
            warnings.simplefilter("ignore")
            cli = None
            try:
                with plain_errors("knl fit"):
                    cli = fit(["--config", "fuzz.yaml", *STEP])
            except SystemExit as end:
                said = errors.getvalue()
                if end.code != 2 or "error: " not in said or "Traceback" in said:
                    return False, f"status {end.code}: {said}"
    except BaseException:
        return False, traceback.format_exc()
    if cli is None:
        return False, ""
    broken = [name for name, value in cli.model.state_dict().items() if not value.float().isfinite().all()]
    return True, f"not finite after a step: {broken}" if broken else ""


@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("part", ["digits_resnet8", "scenes_fcn_knresnet", "digits_dp"])
def test_mutated_configurations_train_or_are_refused(part, share, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = full(str(PROJECT / "configs" / f"{part}.yaml"), capsys)
    config["trainer"] |= {"accelerator": "cpu", "max_epochs": 1, "num_sanity_val_steps": 0}
    config["trainer"] |= {"enable_progress_bar": False, "enable_model_summary": False}
    config["data"]["init_args"] |= {"batch_size": 8, "eval_batch_size": 8}
    if part == "scenes_fcn_knresnet":
        config["data"]["init_args"] |= {"train_scenes": 32, "eval_scenes": 8, "image_size": [32, 32]}
    if part == "digits_dp":  # with noise that need not be calibrated, which takes seconds
        privacy = {"target_epsilon": None, "noise_multiplier": 1.0, "accountant": "rdp"}
        config["trainer"]["callbacks"][0]["init_args"] |= privacy
    generator = random.Random(f"{part} {share} {SEED}")
    failures, trained, count = [], 0, math.ceil(CONFIGURATIONS / 3 / SHARES)
    for _ in range(count):
        text, changes = mutate(config, generator)
        (tmp_path / "fuzz.yaml").write_text(text)
        trains, failure = attempt()
        trained += trains
        if failure:
            failures.append(f"{changes}\n{failure}")
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        torch.set_grad_enabled(True)
    assert not failures, f"{len(failures)} of {count}\n" + "\n\n".join(failures)
    assert trained  # not all of them are refused
