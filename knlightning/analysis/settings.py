"""Settings of runs: what differs from a configuration file, by the dotted names of the command line."""

from collections.abc import Iterable

Value = str | int | float | bool
"""What a key of a configuration is set to."""

BACKBONE = "model.init_args.backbone"
NORM = "model.init_args.backbone.init_args.norm"
DROPOUT = "model.init_args.backbone.init_args.dropout_p"
LEARNING_RATE = "model.init_args.optimizer.init_args.lr"
BATCH_SIZE = "data.init_args.batch_size"
VAL_SPLIT = "data.init_args.val_split"


def short(key: str) -> str:
    """Shorten a key as the command line allows it: without `.init_args`."""
    return key.replace(".init_args", "")


def check_overrides(overrides: Iterable[str], settled: Iterable[str]) -> None:
    """Check that values for all runs leave alone what a command settles for each run.

    Args:
        overrides: Dotted names of the former; `.init_args` may be left out.
        settled: Dotted names of the latter; the learning rate is always one of them.

    Raises:
        ValueError: If a name is in both.
    """
    taken = {short(key) for key in (*settled, LEARNING_RATE)}
    for key in overrides:
        if short(key) in taken:
            raise ValueError(f"{key} is settled by this command for each run: use the command's own arguments")
