"""Say whether this machine, and a configuration on it, are ready to train.

    knl doctor
    knl doctor --config configs/quickstart.yaml

With a configuration it trains on a few batches, and estimates the time of an epoch. It writes nothing.
"""

import os
import platform
import resource
import shutil
import sys
from importlib.metadata import version
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from knlightning.callbacks.stopwatch import Stopwatch
from knlightning.callbacks.summary import Summary
from knlightning.commands.arguments import as_list
from knlightning.commands.lightning_cli import KNLightningCLI
from knlightning.commands.output import say
from knlightning.data.decoding import FORMATS
from knlightning.nn import cpu_passes
from knlightning.text import counted

PACKAGES = ("knlightning", "torch", "torchvision", "lightning", "torchmetrics", "opacus", "jsonargparse", "pillow")
GIB = 2**30


class DoctorCLI(KNLightningCLI):
    """`knl doctor` with a configuration."""

    command = "doctor"
    usage = "[--config FILE] [--key value ...]"

    def without_checkpoint(self, launched: bool) -> None:
        """Go on: nothing is asked of the weights."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make one that trains on a few batches, and writes nothing."""
        trainer = self.config_init.trainer
        self.stopwatch = Stopwatch()
        callbacks = [Summary(self._dumped()[1]), *as_list(trainer.callbacks), self.stopwatch]
        settled: dict[str, Any] = {"callbacks": callbacks, "logger": False, "enable_checkpointing": False}
        settled |= {"enable_progress_bar": False, "enable_model_summary": False}
        settled |= {"limit_val_batches": 0, "num_sanity_val_steps": 0}
        return Trainer(**{**trainer.as_dict(), **settled})

    def execute(self) -> None:
        """Train on a few batches, and say what a run would take."""
        self.trainer.fit(self.model, datamodule=self.datamodule)
        best = self.config_init.best_checkpoint
        say(f"Best:    the epoch with the {'highest' if best.mode == 'max' else 'lowest'} {best.monitor}")
        say(f"Time:    {self.stopwatch.estimate(self.trainer)}")
        say(f"Memory:  {memory(self.model)}")


def machine() -> str:
    """Describe the machine: versions, devices, threads, formats of images, free space."""
    devices = [
        f"{torch.cuda.get_device_name(i)} ({torch.cuda.get_device_properties(i).total_memory / GIB:.0f} GiB)"
        for i in range(torch.cuda.device_count())
    ]
    free = shutil.disk_usage(os.getcwd()).free / GIB
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    passes = "C++ passes" if cpu_passes.library() else "no C++ compiler: plain operations of torch"
    return "\n".join(
        [
            f"Python   {platform.python_version()} on {platform.system()}, {sys.executable}",
            f"Packages {', '.join(f'{name} {version(name)}' for name in PACKAGES)}",
            f"GPUs     {', '.join(devices) or 'none that torch can use'}",
            f"CPU      {counted(cores or 1, 'core')}, {counted(torch.get_num_threads(), 'thread')} of torch",
            f"KNConv   {passes} on CPUs",
            f"Images   {', '.join(FORMATS)}",
            f"Disk     {free:.0f} GiB free in {os.getcwd()}",
        ]
    )


def memory(model: LightningModule) -> str:
    """Say how much memory this process has needed at most."""
    if model.device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(model.device) / GIB:.2f} GiB of the GPU at most"
    unit = 1 if sys.platform == "darwin" else 1024
    return (
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB:.2f} GiB at most, without loader processes"
    )


def main(args: list[str]) -> None:
    """Run `knl doctor`; `args` is the command line after it."""
    if not {"-h", "--help"} & {*args}:
        say(machine())
    if args:
        DoctorCLI(args)
