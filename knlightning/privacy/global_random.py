"""The global generators of torch, numpy and Python, set for a while, and what is drawn from torch's."""

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knlightning.internals.torch import changing_draws


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


class RepeatedDraws:
    """What torch draws in a pass over a batch, to be drawn again in a pass over its first samples.

    It is kept by the seed of what draws: a sample that is read, a hook, the training step.
    """

    def __init__(self) -> None:
        self._drawn: dict[int, list[Tensor]] = {}

    def noted(self) -> AbstractContextManager[Any]:
        """Note what is drawn."""

        def note(values: Tensor) -> None:
            self._drawn.setdefault(torch.initial_seed(), []).append(values.clone())

        return changing_draws(note, of_tensors=True)

    def repeated(self) -> AbstractContextManager[Any]:
        """Draw what was noted, as far as there is room for it."""
        again = {seed: iter(each) for seed, each in self._drawn.items()}

        def repeat(values: Tensor) -> None:
            before = next(again.get(torch.initial_seed(), iter(())), values)
            if before.dim() == values.dim():  # samples are along one of the dimensions, which is shorter now
                before = before[tuple(slice(length) for length in values.shape)]
            if before.shape == values.shape:
                values.copy_(before)

        return changing_draws(repeat, of_tensors=True)
