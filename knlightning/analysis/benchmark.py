"""Networks of `knl benchmark` and their measurement: the presets, the rounds, and the ratios.

Every network runs in a process of its own. All variants of a network run once in each round, one after the other, so
that a machine that becomes slower slows all of them. Ratios are taken within a round, to the "floor": the kernel
normalized network with plain convolutions and no normalization. Medians over the rounds are reported.
"""

import os
import platform
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from knlightning.analysis.measure import PASSES, Worker, milliseconds, start
from knlightning.analysis.variants import Case, NetworkName, Precision, Variant

Row = dict[str, Any]
Preset = Literal["converted", "gpu", "laptop", "table3", "table6", "table7", "table8", "targets"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
FCN_VARIANTS: tuple[Variant, ...] = tuple(variant for variant in VARIANTS if variant != "batch-primitives")
KERNEL_VARIANTS: tuple[Variant, ...] = ("floor", "kernel", "algorithm1")
NETWORK_VARIANTS: tuple[Variant, ...] = ("floor", "kernel", "batch", "group")
MEASURES = ("step_ms", "evaluation_ms", "step_peak", "evaluation_peak", "evaluation_maps", "kept", "flops")
BATCH_SIZES: dict[Preset, int | None] = {
    "converted": None,
    "gpu": 32,
    "laptop": 8,
    "table3": 8,
    "table6": 32,
    "table7": 32,
    "table8": 256,
    "targets": None,
}
RESOLUTIONS: dict[Preset, tuple[int, ...]] = {
    "converted": (128,),
    "laptop": (32,),
    "table3": (512,),
    "table6": (224,),
    "table7": (224,),
    "table8": (32, 64, 128),
}


def list_cases(
    preset: Preset, batch_size: int | None, resolutions: Sequence[int], variants: Sequence[Variant]
) -> list[Case]:
    """List the rows of a preset, those of one setting side by side.

    Args:
        preset: Its name.
        batch_size: Images in a batch; None only for "targets" and "converted", which then have sizes of their own.
        resolutions: Heights and widths of the images, for "table3" heights of the crops; not for "gpu" and "targets".
        variants: Those wanted, as far as the preset has them.
    """
    kernels = [variant for variant in KERNEL_VARIANTS if variant in variants]
    wanted = [variant for variant in VARIANTS if variant in variants]
    if preset == "targets":
        plans: tuple[tuple[NetworkName, int, int], ...] = (("resnet18", 32, 32), ("resnet50", 224, 8))
        nets = [Case(net, variant, size, batch_size or batch) for net, size, batch in plans for variant in wanted]
        layers = [Case("layers", v, 32, batch_size or 8, 1, k) for k in (1, 3, 5, 7) for v in kernels]
        return nets + layers
    if preset == "converted":
        return [
            Case(network, variant, size, batch)
            for network in get_args(NetworkName)
            if network.startswith("torchvision_")
            for size in resolutions
            for batch in ([batch_size] if batch_size else [2, 16])
            for variant in wanted
            if variant in NETWORK_VARIANTS
        ]
    assert batch_size is not None
    if preset == "table8":
        return [
            Case("layers", variant, size, batch_size, stride)
            for stride in (1, 2, 3)
            for size in resolutions
            for variant in kernels
        ]
    if preset == "gpu":
        return _gpu_cases(batch_size, wanted, kernels)
    networks: tuple[NetworkName, ...] = ("resnet18", "resnet34", "resnet50")
    if preset == "table3":
        networks = ("fcn_resnet18", "fcn_resnet34", "fcn_resnet50")
        wanted = [variant for variant in FCN_VARIANTS if variant in variants]
    if preset == "laptop":
        networks = ("resnet18", "layers")
    return [
        Case(network, variant, size, batch_size) for network in networks for size in resolutions for variant in wanted
    ]


def _gpu_cases(batch_size: int, wanted: Sequence[Variant], kernels: Sequence[Variant]) -> list[Case]:
    """List layers, networks, and networks that are compiled, which take longest to start."""
    networks: tuple[NetworkName, ...] = ("resnet18", "resnet50")
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    plans = [(net, precision, False) for net in networks for precision in precisions]
    plans += [(net, "bfloat16", True) for net in networks]
    layers = [
        Case("layers", variant, size, batch_size, precision=precision)
        for size in (32, 128)
        for precision in precisions
        for variant in kernels
    ]
    return layers + [
        Case(net, variant, 224, batch_size, precision=precision, compiled=compiled)
        for net, precision, compiled in plans
        for variant in wanted
        if variant in NETWORK_VARIANTS
    ]


def run_setting(settings: Sequence[Case], rounds: int, device: str, channels_last: bool) -> list[Row]:
    """Measure cases that are compared with each other.

    Args:
        settings: Cases that differ in their variant.
        rounds: Number of rounds; 0 leaves the times out.
        device: "cpu" or "cuda".
        channels_last: Memory format of images and weights.

    Returns:
        For each case its settings, its "status", the costs of `knlightning.analysis.measure.Probe.costs`, and
        "step_ms" and "evaluation_ms", medians over the rounds. Each of these also with the endings "_over_floor" and
        "_over_batch", medians of the ratios to these variants within a round. Also "images_per_second" of the training
        step. What could not be measured is None.
    """
    measured: list[dict[str, list[float | None]]] = [{key: [] for key in MEASURES} for _ in settings]
    with ExitStack() as stack:
        workers = [stack.enter_context(closing(Worker())) for _ in settings]
        # on a CPU in turn: they do not take cores from each other; beside a GPU most of their time is for starting
        starters = stack.enter_context(ThreadPoolExecutor(len(settings) if device == "cuda" else 1))
        starts = starters.map(lambda worker, case: worker.ask(start, case, device, channels_last), workers, settings)
        for costs, values in zip(starts, measured, strict=True):
            for key, value in (costs or {}).items():
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
            row[f"{key}_over_batch"] = median_ratio(values[key], batch[key])
        row["images_per_second"] = None if row["step_ms"] is None else 1e3 * case.batch_size / row["step_ms"]
        rows.append(row)
    return rows


def median(values: Sequence[float | None]) -> float | None:
    """Return the median; None if there are no values or one is missing."""
    present = [value for value in values if value is not None]
    return statistics.median(present) if values and len(present) == len(values) else None


def median_ratio(values: Sequence[float | None], base: Sequence[float | None]) -> float | None:
    """Return the median of the ratios within a round; None if there are none, or one is missing or to 0.

    A peak of memory can be 0: the growth of a process whose network fits into what it had before.
    """
    if len(values) != len(base):
        return None
    return median([v / b if v is not None and b else None for v, b in zip(values, base, strict=True)])


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
