"""Draw test scenes and what the networks of a comparison of normalizations predict.

knl compare --config experiments/compare_scenes.yaml
python experiments/draw_scenes.py
"""

import csv
from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from knlightning import models
from knlightning.callbacks.label_maps import add_legend, coloured, palette_of
from knlightning.commands.command import command
from knlightning.commands.output import save_figure, say
from knlightning.data import DigitScenesDataModule
from knlightning.run_directory import checkpoint_in
from knlightning.tasks.losses import IGNORED

NETWORK = "fcn_knresnet8"
SHOWN = 4
"""Scenes in the picture."""


def draw_scenes(runs: Mapping[str, Path]) -> Figure:
    """Draw test scenes, their true classes, and what runs predict; pixels that do not count are black.

    Args:
        runs: For each normalization the directory of a run, of which the last checkpoint is taken.
    """
    columns: dict[str, Tensor] = {}
    for norm, run in runs.items():
        data = DigitScenesDataModule(eval_batch_size=SHOWN, scaling="unit" if norm == "kernel" else "standard")
        data.setup("test")
        batch = next(iter(data.test_dataloader()))
        images, labels = data.on_after_batch_transfer(batch, 0)
        palette = palette_of(data, len(data.class_names))
        stored = torch.load(checkpoint_in(run, "last"), map_location="cpu", weights_only=True)["state_dict"]
        network = getattr(models, NETWORK)(num_classes=len(data.class_names), norm=norm).eval()
        network.load_state_dict({name.removeprefix("backbone."): value for name, value in stored.items()})
        with torch.no_grad():
            predicted = network(images).argmax(dim=1)
        columns["image"], columns["truth"] = batch[0].permute(0, 2, 3, 1), coloured(labels, palette)  # alike for all
        columns[norm] = coloured(predicted.where(labels != IGNORED, IGNORED), palette)
    figure = Figure(figsize=(1.5 * len(columns), 1.5 * SHOWN + 0.7), layout="constrained")
    grid = figure.subplots(SHOWN, len(columns), squeeze=False)
    for place, (name, pictures) in enumerate(columns.items()):
        grid[0, place].set_title(name, fontsize=9)
        for axes, picture in zip(grid[:, place], pictures, strict=True):
            axes.imshow(picture.numpy(), interpolation="nearest")
            axes.set_axis_off()
    add_legend(figure, palette, data.class_names, range(len(data.class_names)))
    return figure


def main(comparison: Path = Path("runs/compare_scenes")) -> None:
    """Draw the scenes into scenes.png, with the best run of seed 0 of each normalization.

    Args:
        comparison: Directory of a comparison whose rows are normalizations.

    Raises:
        FileNotFoundError: If the comparison has not been run.
    """
    with (comparison / "compare.csv").open(newline="") as file:
        best = [row for row in csv.DictReader(file) if row["best"] == "True" and row["seed"] == "0"]
    runs = {row["row"]: Path(row["directory"]) for row in best if row["diverged"] == "False"}
    save_figure(draw_scenes(runs), comparison / "scenes.png")
    say(f"Written: {comparison}/scenes.png")


if __name__ == "__main__":
    command(main, "python experiments/draw_scenes.py")
