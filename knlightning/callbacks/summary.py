"""What a run is about, in a few lines."""

import math
from collections.abc import Sized
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from knlightning.protocols import KeepsLedger, data_of
from knlightning.tasks.fine_tuning import Freezing
from knlightning.text import counted


class Summary(Callback):
    """Print network, data and length of a run when training starts. It takes the place of Lightning's ModelSummary.

    Args:
        config: Configuration of the run as plain values; it names the network.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        model = config.get("model") or {}
        arguments = model.get("init_args") or {}
        backbone = arguments.get("backbone")
        backbone = backbone if isinstance(backbone, dict) else {}
        given = backbone.get("init_args") or {}
        self._name = (
            given.get("name") or (backbone.get("class_path") or model.get("class_path") or "").rpartition(".")[2]
        )
        self._norm = given.get("norm")
        self._flops: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the operations of the network, before other callbacks change it."""
        data = data_of(trainer)
        network = getattr(pl_module, "backbone", None)
        if data.image_size is not None and isinstance(network, nn.Module):
            channels = 3 if data.mean is None else len(data.mean)
            self._flops = count_flops(network, (channels, *data.image_size))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the lines, with what was loaded or frozen, and how a network was converted."""
        if trainer.is_global_zero:
            print(f"Network: {self._network(pl_module)}")
            if conversion := getattr(getattr(pl_module, "backbone", None), "conversion", ""):
                print(f"         {conversion}")
            if loaded := getattr(pl_module, "loaded", None):
                print(f"Weights: {loaded}")
            freezing = getattr(pl_module, "freezing", None)
            if frozen := freezing.describe(trainer.max_epochs) if isinstance(freezing, Freezing) else "":
                print(f"Frozen:  {frozen}")
            print(f"Data:    {_data(trainer)}")
            print(f"Run:     {_run(trainer)}", flush=True)

    def _network(self, pl_module: LightningModule) -> str:
        name = (self._name or type(pl_module).__name__) + (f" with {self._norm} normalization" if self._norm else "")
        total = sum(parameter.numel() for parameter in pl_module.parameters())
        trained = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
        parts = [name, f"{_short(total)} parameters" + (f" ({_short(trained)} trained)" if trained < total else "")]
        if self._flops:
            parts.append(f"{_short(self._flops)} FLOPs an image")
        return ", ".join(parts)


def count_flops(network: nn.Module, shape: tuple[int, ...]) -> int | None:
    """Count the floating-point operations of an evaluation on one image.

    Args:
        network: The network; it has the same state and mode afterwards.
        shape: Channels, height and width of the image.

    Returns:
        Those of convolutions and matrix products, an addition and a multiplication as two; None if the network does
        not take such images.
    """
    example = next(network.parameters(), torch.empty(0))
    # by forward, so that torch.compile does not compile for a single image
    modes = {module: module.training for module in network.modules()}
    network.eval()
    devices = [example.device] if example.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), FlopCounterMode(display=False) as counter:
            network.forward(torch.zeros(1, *shape, device=example.device, dtype=example.dtype))
    except (RuntimeError, TypeError, ValueError):
        return None
    finally:
        for module, training in modes.items():
            module.training = training
    return int(counter.get_total_flops())


def _data(trainer: Trainer) -> str:
    data = data_of(trainer)
    datamodule = trainer.datamodule  # type: ignore[attr-defined] # set where mypy does not look
    parts = [type(datamodule).__name__ if datamodule is not None else "loaders of your own"]
    images = _num_images(trainer.train_dataloader)
    if images is not None:
        parts.append(counted(images, "training image"))
    loaders = trainer.val_dataloaders
    held_out = [_num_images(loader) for loader in (loaders if isinstance(loaders, list) else [loaders])]
    if held_out and None not in held_out:
        parts.append(f"{sum(n for n in held_out if n):,} for validation")
    if data.num_classes is not None:
        parts.append(f"{data.num_classes} classes")
    if data.image_size is not None:
        parts.append("x".join(map(str, data.image_size)))
    return ", ".join(parts)


def _run(trainer: Trainer) -> str:
    steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    epochs = "no limit of epochs" if trainer.max_epochs in (None, -1) else counted(trainer.max_epochs, "epoch")
    parts = [epochs if not trainer.current_epoch else f"{epochs}, from epoch {trainer.current_epoch}"]
    parts.append(f"{counted(steps, 'step')} an epoch")
    if trainer.max_steps != -1:
        parts.append(f"at most {counted(trainer.max_steps, 'step')}")
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    parts.append(name if trainer.world_size == 1 else f"{trainer.world_size} x {name}")
    parts.append(f"precision {trainer.precision}")
    callbacks = trainer.callbacks  # type: ignore[attr-defined] # set where mypy does not look
    if any(isinstance(callback, KeepsLedger) for callback in callbacks):
        parts.append("private")
    return ", ".join(parts)


def _num_images(loader: Any) -> int | None:
    dataset = getattr(loader, "dataset", None)
    return len(dataset) if isinstance(dataset, Sized) else None


def _short(number: float) -> str:
    """Write a large number as people say it: 11.2 M."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.0f}"
