"""Measure time and memory beside other normalizations.

    knl benchmark
    knl benchmark --preset table6 --batch_size 8

In kind the paper's Tables 6, 7 and 8 (Nasirigerdeh et al., TMLR 2024, Appendix D), and the memory of the networks of
Table 3, on whatever device there is.
"""

import json
import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from itertools import groupby
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from knlightning.analysis.benchmark import (
    BATCH_SIZES,
    FCN_VARIANTS,
    KERNEL_VARIANTS,
    RESOLUTIONS,
    VARIANTS,
    Preset,
    Row,
    list_cases,
    machine,
    run_setting,
)
from knlightning.analysis.benchmark_plots import COLUMNS, draw_bars, draw_scaling
from knlightning.analysis.measure import Device, Worker, choose_device
from knlightning.analysis.parity import compare_paths
from knlightning.analysis.variants import Variant
from knlightning.checks import ArgumentError, check, check_number
from knlightning.commands.command import command
from knlightning.commands.output import save_figure, write_csv
from knlightning.run_directory import replacing


def table(rows: Sequence[Row], title: str) -> Table:
    """Lay out the rows of one setting for the terminal; ratios to the floor stand in brackets."""
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    result.add_column("variant", no_wrap=True)
    for _, head, _ in COLUMNS:
        result.add_column(head.replace(", ", "\n"), justify="right")
    result.add_column("training\nimages/s", justify="right")
    result.add_column("status")
    for row in rows:
        cells = []
        for key, _, unit in COLUMNS:
            value, ratio = row[key], row[f"{key}_over_floor"]
            text = "-" if value is None else f"{value / unit:.3g}" if value < 100 * unit else f"{value / unit:.0f}"
            cells.append(text if ratio is None else f"{text} ({ratio:.2f}x)")
        images = row["images_per_second"]
        result.add_row(row["variant"], *cells, "-" if images is None else f"{images:.3g}", row["status"])
    return result


def beside_batch(row: Row) -> str:
    """Say what a converted network takes beside that with batch normalization."""
    named = {"step_ms": "a training step", "evaluation_ms": "evaluation", "kept": "bytes kept for backward"}
    ratios = {text: row[f"{key}_over_batch"] for key, text in named.items()}
    known = ", ".join(f"{text} {ratio:.2f}" for text, ratio in ratios.items() if ratio is not None)
    return f"{row['variant']}, relative to batch: {known or row['status']}"


def memory_of(row: Row) -> str:
    """Say what a network for segmentation keeps beside that with batch normalization, and what evaluation takes."""
    kept, maps = row["kept_over_batch"], row["evaluation_maps"]
    parts = [
        "" if kept is None else f"keeps {kept:.2f} times what batch keeps for backward",
        "" if maps is None else f"evaluation of a whole image peaks at {maps:.1f} of its largest feature maps",
    ]
    return f"{row['variant']}: " + ("; ".join(part for part in parts if part) or row["status"])


def write(rows: Sequence[Row], settings: Row, stem: Path) -> None:
    """Write `STEM.csv` (a line for each row), `STEM.json` (with machine and settings) and `STEM.png` (a plot).

    Args:
        rows: At least one row.
        settings: Machine and arguments.
        stem: Path without its suffix.
    """
    write_csv(stem.with_suffix(".csv"), list(rows))
    with replacing(stem.with_suffix(".json")) as path:
        path.write_text(json.dumps(settings | {"rows": rows}, indent=1))
    figure = draw_scaling(rows) if settings["preset"] == "table8" else draw_bars(rows)
    save_figure(figure, stem.with_suffix(".png"))


def check_parity(device: str) -> list[Row]:
    """Compare the fused kernels with plain operations in a process of their own, print and return the rows.

    Raises:
        RuntimeError: If they disagree; then their times say nothing.
    """
    with closing(Worker()) as worker:
        rows: list[Row] = worker.ask(compare_paths, device)
    for row in rows:
        print(", ".join(f"{key}: {value}" for key, value in row.items()))
    if not all(row["ok"] for row in rows):
        raise RuntimeError("the fused kernels and the plain operations disagree; see the rows above that are not ok")
    return rows


def benchmark(
    preset: Preset = "laptop",
    batch_size: int | None = None,
    resolutions: list[int] | None = None,
    variants: list[Variant] | None = None,
    rounds: int | None = None,
    device: Device = "auto",
    channels_last: bool = True,
    out: Path = Path("runs/benchmark"),
) -> list[Row]:
    """Measure time, memory and operations of kernel normalized networks beside others.

    Args:
        preset: "converted": networks of torchvision on images of 128x128, batches of 2 and 16, and their kernel
            normalized copies; about ten minutes on two cores. "gpu": on a GPU, parity of the fused kernels with plain
            operations, then four layers, and ResNet-18 and -50 at 224x224, in TF32 and bfloat16, eager and compiled.
            "laptop": ResNet-18 and four layers on small images, about two minutes on two cores. "table3": memory of the
            FCNs of 18, 34 and 50 layers, of a step on crops of 1024x512 and of evaluation of a whole image of
            2048x1024; what is kept grows in proportion to the batch. "table6": time of the ResNets of 18, 34 and 50
            layers. "table7": their memory. "table8": four layers at several resolutions and strides. "targets":
            KNResNet-18 at 32x32 and -50 at 224x224, and layers with kernels from 1x1 to 7x7.
        batch_size: Images in a batch; null for that of the preset, which is the paper's for its tables.
        resolutions: Heights and widths of the images, for "table3" heights of the crops; null for those of the
            preset.
        variants: How the networks normalize, of floor, kernel, algorithm1, batch, batch-primitives, group and layer;
            null for all. Ratios need "floor".
        rounds: Rounds over which medians are taken, after a warm-up; null for 5 ("table3" and "table7": 0, no
            times).
        device: Where to run; auto for a GPU if there is one.
        channels_last: Memory format of images and weights.
        out: Directory of PRESET.csv, PRESET.json and PRESET.png.

    Returns:
        The rows, as written to the files.

    Raises:
        ArgumentError: If an argument is out of its range.
    """
    check_number("batch_size", batch_size, at_least=1, integer=True, none="that of the preset")
    check_number("rounds", rounds, at_least=0, integer=True, none="5, or 0 for table3 and table7")
    ok = resolutions is None or (bool(resolutions) and min(resolutions) >= 16)
    check(ok, "resolutions", resolutions, "a list of numbers of at least 16, such as '[32, 64]'")
    fixed = preset in ("gpu", "targets")
    check(not (resolutions and fixed), "resolutions", resolutions, f"null for the preset {preset}")
    check(variants != [], "variants", variants, f"some of {', '.join(VARIANTS)}")
    device = choose_device(device)
    check(
        preset != "gpu" or device == "cuda",
        "preset",
        preset,
        "another one",
        "This one needs a GPU, and torch finds none",
    )
    if rounds is None:
        rounds = 0 if preset in ("table3", "table7") else 5
    planned = list_cases(
        preset, batch_size or BATCH_SIZES[preset], resolutions or RESOLUTIONS.get(preset, ()), variants or VARIANTS
    )
    if not planned:
        had = FCN_VARIANTS if preset == "table3" else KERNEL_VARIANTS
        raise ArgumentError("variants", variants, f"some of {', '.join(had)} for the preset {preset}")
    console = Console(width=None if sys.stdout.isatty() else 132)
    described = machine(device)
    print(", ".join(f"{key}: {value}" for key, value in described.items()))
    settings: Row = {"preset": preset, "machine": described, "rounds": rounds, "channels_last": channels_last}
    if preset == "gpu":
        settings["parity"] = check_parity(device)
    rows: list[Row] = []
    for title, group in groupby(planned, key=lambda case: case.setting):
        done = run_setting(list(group), rounds, device, channels_last)
        rows += done
        console.print(table(done, title))
        if preset in ("converted", "table3"):
            print(*map(memory_of if preset == "table3" else beside_batch, done), sep="\n")
        write(rows, settings, out / preset)  # after every setting: what is measured is not lost if the run is ended
    print("In brackets: relative to the floor, the same network with plain convolutions and no normalization.")
    print(f"Written: {out / preset}.csv, .json, .png")
    return rows


main = partial(command, benchmark, "knl benchmark")
