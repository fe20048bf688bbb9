"""Simulate how a run on ImageNet grows from 1 to 1,024 devices: time, memory, checkpoints, order of images, readers.

    python experiments/growth.py

The network, its gradients, what it keeps for the backward pass, the checkpoint, and the order of images with the time
to draw it are those of the package, measured here. What depends on machines are arguments: their defaults are
declared, and not measured. Devices exchange gradients around a ring, after the backward pass, as the worst case. The
interval of checkpoints is that of Young (1974): with it the time lost by failures and by writing is least.
"""

import io
import math
import time

import torch

from knlightning.analysis.measure import bytes_kept
from knlightning.checks import check_number
from knlightning.commands.command import command
from knlightning.data import TrainSampler
from knlightning.models import knresnet50

IMAGES = 1_281_167
DEVICES = tuple(4**power for power in range(6))


def orders(devices: int, batch_size: int, steps: int = 2) -> tuple[list[set[int]], float, int]:
    """Draw the first steps of an epoch for each of some devices.

    Args:
        devices: Their number.
        batch_size: Images in a batch of each.
        steps: How many steps to draw.

    Returns:
        The images of each step on all devices, the seconds that one device needs to draw its epoch, and how many
        images the epoch leaves out.
    """
    drawn: list[set[int]] = [set() for _ in range(steps)]
    ranks = range(devices) if devices <= 16 else (0, 1, devices - 1)  # each draws the whole order: a sample suffices
    seconds = 0.0
    for rank in ranks:
        start = time.perf_counter()
        own = list(TrainSampler(IMAGES, 0, devices, rank))
        seconds = time.perf_counter() - start
        for step in range(steps):
            drawn[step] |= set(own[step * batch_size : (step + 1) * batch_size])
    return drawn, seconds, IMAGES % devices


def simulate(
    batch_size: int = 32,
    images_per_second: float = 1000,
    read_per_second: float = 400,
    gigabytes_per_second: float = 25,
    microseconds: float = 20,
    written_per_second: float = 1,
    hours_between_failures: float = 50_000,
) -> None:
    """Print the table.

    Args:
        batch_size: Images in a batch of each device.
        images_per_second: Of one device alone, forward and backward.
        read_per_second: Images that one processor decodes, see `experiments/decoding.py`.
        gigabytes_per_second: Between two devices.
        microseconds: Until a message arrives.
        written_per_second: Gigabytes of a checkpoint.
        hours_between_failures: Of one device; 50,000 are those of Llama 3 (Dubey et al., 2024, table 5: 419 in 54 days
            of 16,384 GPUs).

    Raises:
        ArgumentError: If an argument is out of its range.
    """
    for name, value in dict(locals()).items():
        check_number(name, value, above=0)
    network = knresnet50(num_classes=1000)
    weights = sum(4 * parameter.numel() for parameter in network.parameters())
    kept = bytes_kept(network, torch.rand(1, 3, 224, 224))
    file = io.BytesIO()
    state = network.state_dict()
    torch.save({"state_dict": state, "momentum": {name: value.clone() for name, value in state.items()}}, file)
    # weights, gradients, momentum, and the buckets in which gradients travel
    memory = (4 * weights + batch_size * kept) / 1e9
    writing = file.tell() / 1e9 / written_per_second
    reference, _, _ = orders(1, 16 * batch_size)
    print("| devices | images a step | steps an epoch | seconds an epoch | exchange | GB a device |", end="")
    print(" checkpoint GB | minutes between | left out | order, s | readers |")
    print("| --- " * 11 + "|")
    for devices in DEVICES:
        drawn, seconds, left_out = orders(devices, batch_size)
        if devices == 16:
            assert drawn == reference, "the images of a step depend on the number of devices"
        computing = batch_size / images_per_second
        hops = 2 * (devices - 1)
        exchange = hops * (weights / devices / gigabytes_per_second / 1e9 + microseconds / 1e6)
        steps = math.ceil((IMAGES - left_out) / devices / batch_size)
        between = math.sqrt(2 * writing * 3600 * hours_between_failures / devices) / 60
        print(
            f"| {devices:,} | {devices * batch_size:,} | {steps:,} | {steps * (computing + exchange):,.0f} |"
            f" {exchange / (computing + exchange):.0%} | {memory - (devices == 1) * weights / 1e9:.1f} |"
            f" {file.tell() / 1e9:.2f} | {between:.0f} | {left_out} | {seconds:.1f} |"
            f" {devices * math.ceil(images_per_second / read_per_second):,} |"
        )


if __name__ == "__main__":
    command(simulate, "python experiments/growth.py")
