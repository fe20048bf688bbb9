"""The global generators of torch, numpy and Python, set for a while."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded_generators(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators that layers, transforms and losses draw from, and set them back at the end.

    Args:
        seed: At least 0 and below 2**63. numpy and torch on the CPU use 32 bits of it.
        device: Device whose generator is seeded beside that of the CPU.
    """
    python, numpy_state = random.getstate(), np.random.get_state()  # what others draw from
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        seed_generators(seed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)


def seed_generators(seed: int) -> None:
    """Seed the generators of torch on the CPU, numpy and Python; a hundredth of a millisecond.

    Args:
        seed: As in `seeded_generators`.
    """
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
