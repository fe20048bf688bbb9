"""Measure what kernel normalization costs: time, memory and operations, beside other normalizations and beside none.

In kind the paper's Tables 6, 7 and 8 (Nasirigerdeh et al., TMLR 2024, Appendix D), and the memory of the networks of
Table 3, on whatever device there is:

    knl benchmark
    python -m knlightning.analysis.benchmark --preset table6 --batch_size 8

Every network runs in a process of its own. All variants of a network run once a round, in turn, so that a machine
that grows slower slows all of them alike; ratios are taken within a round, to the "floor": the kernel normalized
network with plain convolutions and no normalization. Medians over the rounds are reported.
"""

import csv
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from rich import box
from rich.console import Console
from rich.table import Table

from knlightning.analysis.command import command
from knlightning.analysis.measure import PASSES, Worker, milliseconds, start
from knlightning.analysis.variants import Case, Network, Variant
from knlightning.run_directory import replacing

Row = dict[str, Any]
Preset = Literal["laptop", "table3", "table6", "table7", "table8", "targets"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
FCN_VARIANTS: tuple[Variant, ...] = tuple(variant for variant in VARIANTS if variant != "batch-primitives")
KERNEL_VARIANTS: tuple[Variant, ...] = ("floor", "kernel", "algorithm1")
MEASURES = ("step_ms", "evaluation_ms", "step_peak", "evaluation_peak", "evaluation_maps", "kept", "flops")
COLUMNS = (
    ("step_ms", "training step, ms", 1.0),
    ("evaluation_ms", "evaluation, ms", 1.0),
    ("step_peak", "step peak, MB", 1e6),
    ("evaluation_peak", "evaluation peak, MB", 1e6),
    ("kept", "kept for backward, MB", 1e6),
    ("flops", "forward pass, GFLOP", 1e9),
)
"""Measure, heading, and the unit in which it is shown."""
BATCH_SIZES: dict[Preset, int | None] = {
    "laptop": 8,
    "table3": 8,
    "table6": 32,
    "table7": 32,
    "table8": 256,
    "targets": None,
}
RESOLUTIONS: dict[Preset, tuple[int, ...]] = {
    "laptop": (32,),
    "table3": (512,),
    "table6": (224,),
    "table7": (224,),
    "table8": (32, 64, 128),
}


def cases(
    preset: Preset, batch_size: int | None, resolutions: Sequence[int], variants: Sequence[Variant]
) -> list[Case]:
    """List the rows of a preset, those of one setting side by side.

    Args:
        preset: its name.
        batch_size: images in a batch; None only for "targets", which then has sizes of its own.
        resolutions: heights and widths of the images, for "table3" heights of the crops; not for "targets".
        variants: those wanted, as far as the preset has them.
    """
    kernels = [variant for variant in KERNEL_VARIANTS if variant in variants]
    wanted = [variant for variant in VARIANTS if variant in variants]
    if preset == "targets":
        plans: tuple[tuple[Network, int, int], ...] = (("resnet18", 32, 32), ("resnet50", 224, 8))
        nets = [Case(net, variant, size, batch_size or batch) for net, size, batch in plans for variant in wanted]
        layers = [Case("layers", v, 32, batch_size or 8, 1, k) for k in (1, 3, 5, 7) for v in kernels]
        return nets + layers
    assert batch_size is not None
    if preset == "table8":
        return [
            Case("layers", variant, size, batch_size, stride)
            for stride in (1, 2, 3)
            for size in resolutions
            for variant in kernels
        ]
    networks: tuple[Network, ...] = ("resnet18", "resnet34", "resnet50")
    if preset == "table3":
        networks = ("fcn_resnet18", "fcn_resnet34", "fcn_resnet50")
        wanted = [variant for variant in FCN_VARIANTS if variant in variants]
    if preset == "laptop":
        networks = ("resnet18", "layers")
    return [
        Case(network, variant, size, batch_size) for network in networks for size in resolutions for variant in wanted
    ]


def run_setting(settings: Sequence[Case], rounds: int, device: str, channels_last: bool) -> list[Row]:
    """Measure cases that are compared with each other.

    Args:
        settings: cases that differ in their variant.
        rounds: number of rounds; 0 leaves the times out.
        device: "cpu" or "cuda".
        channels_last: memory format of images and weights.

    Returns:
        For each case its settings, its "status", the costs of :meth:`knlightning.analysis.measure.Probe.costs`, and
        "step_ms" and "evaluation_ms", medians over the rounds. Each of these also with the ending "_over_floor",
        medians of the ratios within a round, and "kept_over_batch", relative to the variant "batch". None is what
        could not be measured.
    """
    measured: list[dict[str, list[float | None]]] = [{key: [] for key in MEASURES} for _ in settings]
    with ExitStack() as stack:
        workers = []
        for case, values in zip(settings, measured, strict=True):  # in turn: they do not take cores from each other
            workers.append(stack.enter_context(closing(Worker())))
            for key, value in (workers[-1].ask(start, case, device, channels_last) or {}).items():
                values[key].append(value)
        for _ in range(rounds):
            for which in PASSES:
                for worker, values in zip(workers, measured, strict=True):
                    values[f"{which}_ms"].append(worker.ask(milliseconds, which))
        states = [worker.status for worker in workers]
    by_variant = {case.variant: values for case, values in zip(settings, measured, strict=True)}
    nothing: dict[str, list[float | None]] = {key: [] for key in MEASURES}
    floor, batch = by_variant.get("floor", nothing), by_variant.get("batch", nothing)
    rows = []
    for case, status, values in zip(settings, states, measured, strict=True):
        row: Row = {"setting": case.setting, **asdict(case), "status": status}
        for key in MEASURES:
            row[key] = median(values[key])
            row[f"{key}_over_floor"] = median_ratio(values[key], floor[key])
        row["kept_over_batch"] = median_ratio(values["kept"], batch["kept"])
        rows.append(row)
    return rows


def median(values: Sequence[float | None]) -> float | None:
    """Return the median; None if there are no values or one is missing."""
    present = [value for value in values if value is not None]
    return statistics.median(present) if values and len(present) == len(values) else None


def median_ratio(values: Sequence[float | None], base: Sequence[float | None]) -> float | None:
    """Return the median of the ratios within a round; None if there are none or a value is missing."""
    if len(values) != len(base):
        return None
    return median([v / b if v is not None and b is not None else None for v, b in zip(values, base, strict=True)])


def machine(device: str) -> dict[str, str | int]:
    """Describe the machine: processor, cores, threads of torch, GPU if it is used, and versions."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    described: dict[str, str | int] = {
        "processor": processor,
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        described["gpu"] = torch.cuda.get_device_name()
    return described | {"torch": torch.__version__, "python": platform.python_version(), "system": platform.platform()}


def table(rows: Sequence[Row], title: str) -> Table:
    """Lay out the rows of one setting for the terminal; ratios to the floor stand in brackets."""
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    result.add_column("variant", no_wrap=True)
    for _, head, _ in COLUMNS:
        result.add_column(head.replace(", ", "\n"), justify="right")
    result.add_column("status")
    for row in rows:
        cells = []
        for key, _, unit in COLUMNS:
            value, ratio = row[key], row[f"{key}_over_floor"]
            text = "-" if value is None else f"{value / unit:.3g}" if value < 100 * unit else f"{value / unit:.0f}"
            cells.append(text if ratio is None else f"{text} ({ratio:.2f}x)")
        result.add_row(row["variant"], *cells, row["status"])
    return result


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
        rows: at least one row.
        settings: machine and arguments.
        stem: path without its suffix.
    """
    with replacing(stem.with_suffix(".csv")) as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with replacing(stem.with_suffix(".json")) as path:
        path.write_text(json.dumps(settings | {"rows": rows}, indent=1))
    figure = draw_scaling(rows) if settings["preset"] == "table8" else draw_bars(rows)
    with replacing(stem.with_suffix(".png")) as path:
        figure.savefig(path, dpi=120, format="png")


def draw_bars(rows: Sequence[Row]) -> Figure:
    """Draw a bar for each row and measure, relative to the floor; no bars where there is no floor."""
    figure = Figure(figsize=(14, 1 + 0.3 * len(rows)), layout="constrained")
    all_axes: Sequence[Axes] = figure.subplots(1, len(COLUMNS), sharey=True)
    for axes, (key, title, _) in zip(all_axes, COLUMNS, strict=True):
        for i, row in enumerate(rows):
            ratio = row[f"{key}_over_floor"]
            axes.barh(i, ratio or 0.0, color=f"C{VARIANTS.index(row['variant'])}")
            text = row["status"] if row["status"] != "ok" else "" if ratio is None else f"{ratio:.2f}"
            axes.annotate(text, (ratio or 0.0, i), (3, 0), textcoords="offset points", va="center", fontsize=7)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.margins(x=0.25)
        axes.set_title(f"{title.partition(',')[0]}\nrelative to the floor", fontsize=9)
    names = [f"{row['setting']}: {row['variant']}" for row in rows]
    all_axes[0].set_yticks(range(len(rows)), names, fontsize=7)
    all_axes[0].invert_yaxis()
    return figure


def draw_scaling(rows: Sequence[Row]) -> Figure:
    """Draw each measure against the resolution: a colour for each variant, a line style for each stride."""
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    lines = dict.fromkeys((row["variant"], row["stride"]) for row in rows)
    for axes, (key, title, unit) in zip(figure.subplots(2, len(COLUMNS) // 2).flat, COLUMNS, strict=True):
        for variant, stride in lines:
            points = [
                (row["resolution"], row[key]) for row in rows if (row["variant"], row["stride"]) == (variant, stride)
            ]
            axes.plot(
                [x for x, y in points if y is not None],
                [y / unit for x, y in points if y is not None],
                ("-", "--", ":")[stride - 1],
                marker="o",
                color=f"C{VARIANTS.index(variant)}",
                label=f"{variant}, stride {stride}",
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())
        axes.set_xlabel("height and width")
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=7)
    return figure


def benchmark(
    preset: Preset = "laptop",
    batch_size: int | None = None,
    resolutions: list[int] | None = None,
    variants: list[Variant] | None = None,
    rounds: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    channels_last: bool = True,
    out: Path = Path("runs/benchmark"),
) -> list[Row]:
    """Measure time, memory and operations of kernel normalized networks beside others.

    Args:
        preset: "laptop": ResNet-18 and four layers on small images, about two minutes on two cores. "table3": memory
            of the FCNs of 18, 34 and 50 layers, of a step on crops of 1024x512 and of evaluation of a whole image of
            2048x1024; what is kept grows in proportion to the batch. "table6": time of the ResNets of 18, 34 and 50
            layers. "table7": their memory. "table8": four layers at several resolutions and strides. "targets":
            KNResNet-18 at 32x32 and -50 at 224x224, and layers with kernels from 1x1 to 7x7.
        batch_size: images in a batch; null for that of the preset, which is the paper's for its tables.
        resolutions: heights and widths of the images, for "table3" heights of the crops; null for those of the
            preset.
        variants: how the networks normalize, of floor, kernel, algorithm1, batch, batch-primitives, group and layer;
            null for all. Ratios need "floor".
        rounds: rounds over which medians are taken, after a warm-up; null for 5 ("table3" and "table7": 0, no
            times).
        device: where to run; auto for a GPU if there is one.
        channels_last: memory format of images and weights.
        out: directory of PRESET.csv, PRESET.json and PRESET.png.

    Returns:
        The rows, as written to the files.

    Raises:
        ValueError: if an argument is out of its range.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, got {batch_size}")
    if resolutions is not None and (not resolutions or min(resolutions) < 16):
        raise ValueError(
            f"--resolutions must be a list of numbers of at least 16, such as '[32, 64]', got {resolutions}"
        )
    if resolutions and preset == "targets":
        raise ValueError("--resolutions cannot be chosen for the preset targets: its sizes are part of the targets")
    if rounds is not None and rounds < 0:
        raise ValueError(f"--rounds must be at least 0, got {rounds}")
    if variants is not None and not variants:
        raise ValueError(f"--variants must name some of {', '.join(VARIANTS)}, got none")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; use --device cpu or auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if rounds is None:
        rounds = 0 if preset in ("table3", "table7") else 5
    planned = cases(
        preset, batch_size or BATCH_SIZES[preset], resolutions or RESOLUTIONS.get(preset, ()), variants or VARIANTS
    )
    if not planned:
        had = FCN_VARIANTS if preset == "table3" else KERNEL_VARIANTS
        raise ValueError(f"--variants: the preset {preset} has only {', '.join(had)}, got {variants}")

    console = Console(width=None if sys.stdout.isatty() else 132)
    described = machine(device)
    print(", ".join(f"{key}: {value}" for key, value in described.items()))
    settings = {"preset": preset, "machine": described, "rounds": rounds, "channels_last": channels_last}
    rows: list[Row] = []
    for title, group in groupby(planned, key=lambda case: case.setting):
        done = run_setting(list(group), rounds, device, channels_last)
        rows += done
        console.print(table(done, title))
        if preset == "table3":
            print(*map(memory_of, done), sep="\n")
        write(rows, settings, out / preset)  # after every setting: what is measured is not lost if the run is ended
    print("In brackets: relative to the floor, the same network with plain convolutions and no normalization.")
    print(f"Written: {out / preset}.csv, .json, .png")
    return rows


def main(args: list[str] | None = None) -> None:
    """Run `knl benchmark` with the arguments of a command line, those of the process if None."""
    command(benchmark, "knl benchmark", args)


if __name__ == "__main__":
    main()
