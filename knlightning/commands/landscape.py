"""Draw the loss around the weights of trained networks, and measure how sharp their minima are.

    knl landscape --runs '{batch: runs/digits_resnet8/0, kernel: runs/digits_resnet8/1}'

With `--trajectory true` in the plane in which training moved the weights, of runs that keep all checkpoints:

    knl fit --config configs/digits_resnet8.yaml --trainer.callbacks ModelCheckpoint --trainer.callbacks.save_top_k -1
"""

import hashlib
import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import numpy as np
import torch
from lightning import seed_everything
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional as F

from knlightning.analysis.landscape import (
    LossFunction,
    Trajectory,
    largest_eigenvalue,
    loss_rows,
    losses_in_ball,
    trajectory_plane,
    use_batch_statistics,
)
from knlightning.analysis.landscape_plots import MOVED, TRAINED, draw_contours, draw_lines, draw_surfaces
from knlightning.analysis.measure import Device, choose_device
from knlightning.checkpoint_files import read_checkpoint
from knlightning.checks import ArgumentError, check, check_number
from knlightning.commands.command import command
from knlightning.commands.output import save_figure, say, write_text
from knlightning.data import BaseDataModule
from knlightning.loading import checkpoint_of, load
from knlightning.run_directory import CHECKPOINTS, ROOT

HEADS = ("run", "loss", "mean loss in the ball ± SD", "largest eigenvalue", "in norms of the filters")


def landscape(
    runs: list[Path] | dict[str, Path],
    split: Literal["train", "val", "test"] = "train",
    num_images: int = 1024,
    dimensions: Literal[1, 2] = 2,
    points: int = 25,
    reach: float = 1.0,
    radius: float = 0.5,
    draws: int = 20,
    eigenvalues: bool = True,
    batch_statistics: bool = False,
    trajectory: bool = False,
    seed: int = 0,
    device: Device = "auto",
    out: Path = ROOT / "landscape",
    data: dict[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Draw the loss around the weights of runs, side by side, and measure how sharp their minima are.

    The loss is the cross-entropy of images without augmentation, the same for all runs, of a network in evaluation:
    batch normalization uses its running statistics. Directions are random and filter-normalized, and leave biases,
    scales and shifts as they are (Li et al., NeurIPS 2018). What is computed already is not computed again.

    Args:
        runs: Directories of runs, of which the best checkpoint is taken, or files of checkpoints; with or without
            names for the pictures.
        split: Which images.
        num_images: Number of images, the first of an epoch.
        dimensions: 1 computes a line, 2 a plane as well.
        points: Number of points in each direction, odd.
        reach: How far the directions reach, in norms of the filters, or in distances of the farthest checkpoint.
        radius: Radius of the ball in which the mean loss is taken, in norms of the filters.
        draws: Number of random points in it.
        eigenvalues: Whether the largest eigenvalue of the Hessian is computed, which takes most of the time.
        batch_statistics: Whether batch normalization takes the statistics of the 256 images that are computed at once,
            in place of its running statistics.
        trajectory: Whether the directions are the first two principal components of all checkpoints of a run, three
            or more. The last one is in the middle; the statistics of batch normalization are its own.
        seed: Seed of images and directions.
        device: Where to compute; auto for all GPUs if there are any.
        out: Directory of a JSON file for each run, sharpness.md, lines.png, contours.png and surfaces.png.
        data: Arguments of the datamodules that are no longer those of the runs, such as {root: FOLDER}.

    Returns:
        For each run its "loss", "ball", "rows" and "eigenvalues", as in its JSON file.

    Raises:
        ValueError: If an argument is out of its range, or `out` holds other results by these names.
        FileNotFoundError: If there is no such run.
    """
    check(bool(runs), "runs", runs, "at least one directory of a run")
    check_number("num_images", num_images, at_least=1, integer=True)
    check_number("draws", draws, at_least=2, integer=True)
    check_number("reach", reach, above=0)
    check_number("radius", radius, above=0)
    check(points > 1 and points % 2 == 1, "points", points, "an odd number at least 3")
    chosen = choose_device(device)
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if chosen == "cuda" else ["cpu"]
    named = runs if isinstance(runs, dict) else {f"{run.absolute().parent.name}/{run.name}": run for run in runs}
    offsets = np.linspace(-reach, reach, points).tolist()
    rows = [points // 2] if dimensions == 1 else range(points)
    settings = {"split": split, "num_images": num_images, "reach": reach, "points": points, "seed": seed}
    settings |= {"radius": radius, "draws": draws, "batch_statistics": batch_statistics}
    results: dict[str, dict[str, Any]] = {}
    for name, run in named.items():
        path = out / (re.sub(r"[^\w.]+", "-", name) + ".json")
        checkpoints = _all_checkpoints(run) if trajectory else [checkpoint_of(run)]
        result = results[name] = _stored(path, settings | {"checkpoint": "".join(map(_digest, checkpoints))})
        missing = [index for index in rows if str(index) not in result["rows"]]
        if missing or (eigenvalues and "eigenvalues" not in result):
            say(f"{name}: {checkpoints[-1]}")
            model = load(checkpoints[-1], data=data)
            if batch_statistics:
                use_batch_statistics(model.network)
            images, labels = _images(model.datamodule, split, num_images, seed)
            function = LossFunction(model.network, images, labels, _loss_of(model.task), device=devices[0])
            before = [LossFunction(load(one, data=data).network, images, labels).weights for one in checkpoints[:-1]]
            _measure(function, devices, offsets, missing, eigenvalues, result, path, before)
        _write(results, offsets, out)
    say((out / "sharpness.md").read_text())
    say(f"Written: {out}/sharpness.md, lines.png" + (", contours.png, surfaces.png" if dimensions == 2 else ""))
    return results


def _measure(
    function: LossFunction,
    devices: list[str],
    offsets: list[float],
    missing: list[int],
    eigenvalues: bool,
    result: dict[str, Any],
    path: Path,
    before: list[Tensor],
) -> None:
    """Compute what is missing of a result, and store it bit by bit."""
    settings = result["settings"]
    if "ball" not in result:
        result["loss"] = function(function.weights)
        result["ball"] = losses_in_ball(function, settings["radius"], settings["draws"], settings["seed"])
    generator = torch.Generator().manual_seed(settings["seed"])
    directions = function.random_direction(generator), function.random_direction(generator)
    if before:
        directions, trajectory = trajectory_plane([*before, function.weights.cpu()])
        result["trajectory"] = trajectory._asdict()
    functions = [function, *(function.to(device) for device in devices[1:])]
    for index, losses in loss_rows(functions, directions, offsets, missing):
        result["rows"][str(index)] = losses
        write_text(path, json.dumps(result))
    if eigenvalues and "eigenvalues" not in result:
        units = function.filter_norms(function.weights)
        result["eigenvalues"] = [largest_eigenvalue(function), largest_eigenvalue(function, units)]
    write_text(path, json.dumps(result))


def _write(results: Mapping[str, dict[str, Any]], offsets: list[float], out: Path) -> None:
    """Write the table and the pictures of the runs so far."""
    surfaces = {}
    trajectories = {name: Trajectory(**found["trajectory"]) for name, found in results.items() if "trajectory" in found}
    lines = ["| " + " | ".join(HEADS) + " |", "| --- " * len(HEADS) + "|"]
    for name, result in results.items():
        nothing = [float("nan")] * len(offsets)
        surfaces[name] = np.array([result["rows"].get(str(index), nothing) for index in range(len(offsets))])
        found = [f"{value:.4g}" for value in result.get("eigenvalues", [])] or ["", ""]
        ball = f"{mean(result['ball']):.3g} ± {stdev(result['ball']):.2g}"
        lines.append(f"| {name} | {result['loss']:.3g} | {ball} | {' | '.join(found)} |")
    write_text(out / "sharpness.md", "\n".join(lines) + "\n")
    save_figure(draw_lines(surfaces, offsets, TRAINED if trajectories else MOVED), out / "lines.png")
    if not any(np.isnan(losses).any() for losses in surfaces.values()):
        save_figure(draw_contours(surfaces, offsets, trajectories), out / "contours.png")
        save_figure(draw_surfaces(surfaces, offsets), out / "surfaces.png")


def _stored(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Read what was computed with these settings before."""
    if not path.is_file():
        return {"settings": settings, "rows": {}}
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        before = dict(result["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}. Remove it, and it is computed again") from error
    if differing := sorted(key for key in settings if before.get(key) != settings[key]):
        raise ValueError(f"{path} was computed with another {differing[0]}: choose another directory, or remove it")
    return result


def _all_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run in the order of training, one for each step."""
    found = sorted((run / CHECKPOINTS).glob("*.ckpt"), reverse=True)
    steps = {read_checkpoint(path, map_location="meta")["global_step"]: path for path in found}
    hint = "A run keeps all of them by --trainer.callbacks ModelCheckpoint --trainer.callbacks.save_top_k -1"
    check(len(steps) > 2, "runs", str(run), "runs of three or more checkpoints, with trajectory", hint)
    return [steps[step] for step in sorted(steps)]


def _digest(checkpoint: Path) -> str:
    with checkpoint.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _images(data: Any, split: str, num_images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the first images of an epoch, without augmentation where it is done on batches, and their labels."""
    if not isinstance(data, BaseDataModule):
        raise ArgumentError("runs", type(data).__name__, "runs with a knlightning.data.BaseDataModule")
    seed_everything(seed, verbose=False)  # orders the training images, whatever the seeds of the runs were
    data.setup({"train": "fit", "val": "validate"}.get(split, split))
    images, labels, count = [], [], 0
    for batch in getattr(data, f"{split}_dataloader")():
        images.append(data.prepared(batch[0], train=False))
        labels.append(batch[1].long())
        count += len(batch[0])
        if count >= num_images:
            break
    return torch.cat(images)[:num_images], torch.cat(labels)[:num_images]


def _loss_of(task: LightningModule) -> Any:
    return partial(F.cross_entropy, ignore_index=getattr(task, "ignore_index", -100))


main = partial(command, landscape, "knl landscape")
