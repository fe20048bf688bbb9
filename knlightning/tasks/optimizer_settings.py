"""Settings of optimizers: which of them no optimizer can compute with."""

import torch
from torch.optim import Optimizer

from knlightning.checks import check


def check_settings(optimizer: Optimizer) -> None:
    """Check that the settings of an optimizer are numbers with which it can compute.

    Args:
        optimizer: With its schedule, which may have settings in it.

    Raises:
        ArgumentError: If a number among them is not finite in float32.
    """
    for group in optimizer.param_groups:
        for name, setting in group.items():
            parts = enumerate(setting) if isinstance(setting, tuple) else ()
            for key, value in [(name, setting), *((f"{name}[{place}]", part) for place, part in parts)]:
                if isinstance(value, float):
                    ok = abs(value) <= torch.finfo(torch.float32).max
                    check(ok, key, value, f"finite in float32 for the optimizer {type(optimizer).__name__}")
