"""Compare normalizations in segmentation, on scenes of handwritten digits: a table, curves, and predictions.

    python -m knlightning.analysis.scenes

The network is `fcn_knresnet8`; with another norm than `kernel` it is built of plain convolutions. Rates are searched as
in `knlightning.analysis.compare`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from knlightning import models
from knlightning.analysis.command import command
from knlightning.analysis.compare import compare
from knlightning.analysis.sweep import Search, save_figure, say
from knlightning.callbacks.label_maps import coloured, palette_of
from knlightning.data import DigitScenesDataModule
from knlightning.nn import Norm
from knlightning.run_directory import ROOT, checkpoint_in
from knlightning.tasks.losses import IGNORED

NETWORK = "fcn_knresnet8"
SHOWN = 4
"""Scenes in the picture."""


def scenes(
    config: Path = Path("configs/scenes_fcn_knresnet.yaml"),
    norms: Sequence[Norm] = ("kernel", "batch", "group", "layer", "local_context"),
    start: float = 0.012,
    seeds: int = 3,
    epochs: int = 4,
    batch_size: int = 8,
    val_split: float = 0.2,
    patience: int = 1,
    max_halvings: int = 3,
    out: Path = ROOT / "scenes",
    overrides: Mapping[str, str] | None = None,
) -> dict[tuple[str, Norm, int], Search]:
    """Compare normalizations in segmentation; print a table of the mean IoU, and draw curves and predictions.

    For each normalization the learning rate is searched by the mean IoU on scenes of digits that are held out; the best
    one is repeated with several seeds. Runs that are done are not repeated, so that a comparison that was ended goes
    on. Any option of knl fit with a dot in its name, such as --data.train_scenes 100, holds for all runs.

    Args:
        config: configuration file of a run of segmentation on digit scenes.
        norms: normalizations.
        start: the highest learning rate.
        seeds: number of runs with the best rate, the one of the search among them.
        epochs: length of a run.
        batch_size: scenes in a batch.
        val_split: share of the training digits that is held out, for choosing the rate and for the curves.
        patience: rates in a row that have to be worse than the best before a search ends.
        max_halvings: halvings after which it ends in any case.
        out: directory of the runs, compare.csv (all of them), compare.png and scenes.png.
        overrides: values of the configuration by dotted names, for all runs.

    Returns:
        What was found, by network, normalization and batch size.

    Raises:
        ValueError: An argument is out of its range, or `out` holds runs of other settings.
    """
    searches = compare(
        config,
        {NETWORK: list(norms)},
        (batch_size,),
        {NETWORK: (start,)},
        seeds,
        (epochs,),
        val_split,
        patience,
        max_halvings,
        out,
        overrides,
    )
    runs = {
        norm: found.repeats[0].directory for (_, norm, _), found in searches.items() if not found.repeats[0].diverged
    }
    save_figure(draw_scenes(runs), out / "scenes.png")
    say(f"Written: {out}/scenes.png")
    return searches


def draw_scenes(runs: Mapping[Norm, Path]) -> Figure:
    """Draw test scenes, their true classes, and what runs predict; pixels that do not count are black.

    Args:
        runs: for each normalization the directory of a run, of which the last checkpoint is taken.
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
    figure = Figure(figsize=(1.5 * len(columns), 1.5 * SHOWN + 0.3), layout="constrained")
    grid = figure.subplots(SHOWN, len(columns), squeeze=False)
    for place, (name, pictures) in enumerate(columns.items()):
        grid[0, place].set_title(name, fontsize=9)
        for axes, picture in zip(grid[:, place], pictures, strict=True):
            axes.imshow(picture.numpy(), interpolation="nearest")
            axes.set_axis_off()
    return figure


def main(args: list[str] | None = None) -> None:
    """Run the comparison with the arguments of a command line, those of the process if None."""
    command(scenes, "python -m knlightning.analysis.scenes", args)


if __name__ == "__main__":
    main()
