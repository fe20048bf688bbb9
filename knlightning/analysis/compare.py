"""Compare normalizations at several batch sizes by the paper's protocol: a table, and the curves of convergence.

For each network and batch size the learning rate is searched, and the best is repeated with several seeds, as
`knl sweep-lr` does. The default is Table 1 and Figure 4 of Nasirigerdeh et al. (TMLR 2024) in miniature, on handwritten
digits: ResNet-8 with every normalization, and KNResNet-8.

    python -m knlightning.analysis.compare
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from knlightning.analysis.command import command
from knlightning.analysis.curves import draw_convergence
from knlightning.analysis.sweep import (
    BY_TEST,
    Search,
    save_figure,
    say,
    search,
    with_overrides,
    write_csv,
)
from knlightning.analysis.trials import BATCH_SIZE, NORM, VAL_SPLIT, Value
from knlightning.nn import Norm
from knlightning.run_directory import ROOT

NETWORKS: dict[str, list[Norm]] = {
    "resnet8": [norm for norm in get_args(Norm) if norm != "sync_batch"],  # which is batch, on a single device
    "knresnet8": ["kernel"],
}
STARTS = {"resnet8": (0.00625, 0.05), "knresnet8": (0.05, 0.4)}
"""Highest rates of the searches with batches of 2 and of 32."""


def compare(
    config: Path = Path("configs/digits_resnet8.yaml"),
    networks: dict[str, list[Norm]] | None = None,
    batch_sizes: tuple[int, ...] = (2, 32),
    starts: dict[str, tuple[float, ...]] | None = None,
    seeds: int = 3,
    epochs: tuple[int, ...] = (4, 16),
    val_split: float = 0.2,
    patience: int = 2,  # one run on few images is too noisy to end a search
    max_halvings: int = 8,
    out: Path = ROOT / "compare",
    overrides: Mapping[str, str] | None = None,
) -> dict[tuple[str, Norm, int], Search]:
    """Compare normalizations at several batch sizes; print a table of test accuracies, and draw the convergence.

    Kernel normalized networks take images divided by 255, all others images with zero mean and unit variance, as in
    the paper. Runs that are done are not repeated, so that a comparison that was ended goes on. Any option of knl fit
    with a dot in its name, such as --trainer.limit_train_batches 10, holds for all runs.

    Args:
        config: configuration file of a run; of segmentation, accuracies are the mean IoU.
        networks: functions of knlightning.models, or other class paths, each with the normalizations to give to its
            argument `norm`; null for all with resnet8, and knresnet8.
        batch_sizes: batch sizes of training.
        starts: for each network and batch size the highest learning rate, from which it is halved until the best is
            passed; null for sensible ones, if networks is null too.
        seeds: number of runs with the best rate, the one of the search among them.
        epochs: for each batch size the epochs of a run; smaller batches make more steps of an epoch.
        val_split: share of the training images that is held out, for choosing the rate and for the curves.
        patience: rates in a row that have to be worse than the best before a search ends.
        max_halvings: halvings after which it ends in any case.
        out: directory of the runs, compare.csv (all of them) and compare.png.
        overrides: values of the configuration by dotted names, for all runs.

    Returns:
        What was found, by network, normalization and batch size.

    Raises:
        ValueError: An argument is out of its range, or `out` holds runs of other settings.
    """
    by_network: Mapping[str, tuple[float, ...]] = starts or ({} if networks else STARTS)
    networks = networks or NETWORKS
    for name, given in {"epochs": epochs, **{f"starts.{name}": by_network.get(name, ()) for name in networks}}.items():
        if len(given) != len(batch_sizes):
            raise ValueError(
                f"--{name} must have one number for each of the {len(batch_sizes)} batch sizes, got {len(given)}"
            )
    searches: dict[tuple[str, Norm, int], Search] = {}
    for network, norms in networks.items():
        for norm in norms:
            for size, start, length in zip(batch_sizes, by_network[network], epochs, strict=True):
                settings: dict[str, Value] = {
                    "model.init_args.backbone": network if "." in network else f"knlightning.models.{network}",
                    NORM: norm,
                    BATCH_SIZE: size,
                    VAL_SPLIT: val_split,
                    "data.init_args.scaling": "unit" if norm == "kernel" else "standard",
                    "trainer.max_epochs": length,
                    "trainer.enable_progress_bar": "false",
                    "trainer.enable_model_summary": "false",
                }
                settings = with_overrides(settings, overrides or {})
                directory = out / f"{network}-{norm}-batch{size}"
                found = search(config, directory, settings, start, seeds, patience, max_halvings)
                searches[network, norm, size] = found
                _write(searches, out)
    say(f"\nTest accuracy (segmentation: mean IoU) in %{', mean ± SD of' if seeds > 1 else ','} {seeds} seeds\n")
    say(table(searches))
    for (network, norm, size), found in searches.items():
        for note in found.notes:
            say(f"{network}, {norm}, batch size {size}: {note}")
    if val_split == 0:
        say(BY_TEST)
    say(f"Written: {out}/compare.csv, compare.png")
    return searches


def table(searches: Mapping[tuple[str, Norm, int], Search]) -> str:
    """Return a table in Markdown: a row a network, and for each batch size the test accuracy and the best rate."""
    sizes = list(dict.fromkeys(size for _, _, size in searches))
    lines = [
        "| network | normalization |" + "".join(f" B={size} | rate |" for size in sizes),
        "| --- | --- |" + " --- | --- |" * len(sizes),
    ]
    for network, norm in dict.fromkeys((network, norm) for network, norm, _ in searches):
        found = [searches[network, norm, size] for size in sizes]
        lines.append(f"| {network} | {norm} |" + "".join(f" {one.accuracy} | {one.rate:g} |" for one in found))
    return "\n".join(lines)


def _write(searches: Mapping[tuple[str, Norm, int], Search], out: Path) -> None:
    """Write what has been found so far."""
    write_csv(
        out / "compare.csv",
        [
            {"network": network, "norm": norm, "batch_size": size, "best": trial.rate == found.rate, **asdict(trial)}
            for (network, norm, size), found in searches.items()
            for trial in found.trials
        ],
    )
    panels: dict[str, dict[str, list[Path]]] = {}
    for (network, norm, size), found in searches.items():
        runs = [trial.directory for trial in found.repeats if not trial.diverged]
        panels.setdefault(f"batch size {size}", {})[f"{network}, {norm}"] = runs
    save_figure(draw_convergence(panels), out / "compare.png")


def main(args: list[str] | None = None) -> None:
    """Run the comparison with the arguments of a command line, those of the process if None."""
    command(compare, "python -m knlightning.analysis.compare", args)


if __name__ == "__main__":
    main()
