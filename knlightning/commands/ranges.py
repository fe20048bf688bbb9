"""Values that a configuration may have, where jsonargparse and Lightning take any."""

import re
from collections.abc import Iterable
from typing import Any

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from knlightning.checks import FITTING, ArgumentError, check, check_number, fits
from knlightning.commands.arguments import find_argument, walk

MOST_BATCHES = 10**9
"""Largest number of batches that a limit may be; more is no limit."""


def check_parsed(parser: ArgumentParser, config: Namespace, groups: Iterable[str]) -> None:
    """Check that groups of arguments are groups, that whole numbers fit, and that null has a meaning where it stands.

    jsonargparse checks none of it.

    Args:
        parser: Has parsed the configuration.
        config: The configuration of a run.
        groups: Keys of the groups.

    Raises:
        ValueError: If one of them is, or was in a file before the command line has added to it, a single value.
        ArgumentError: If null stands in the place of a bool, a number or another value, or a whole number does not fit
            into 64 bits.
    """
    defaults = parser.get_defaults()
    for key in groups:
        group = config.get(key)
        if not isinstance(group, Namespace) or vars(defaults[key]).keys() - vars(group).keys():
            raise ValueError(f"{key} must be a group of arguments (name: value, or {{}} for none), not a single value")
    for key, value in walk(config.as_dict()):
        if isinstance(value, int):
            check(fits(value), key, value, FITTING)
    set_parsing_settings(unset_sentinel=True)  # null is then a value like others, and not one that is not given
    try:
        parser.validate(config, skip_required=True)
    except TypeError as error:
        name = re.findall(r'Parser key "([^"]+)"', str(error))[-1].rpartition(".")[2]
        hint = "Leave the key out to have its default"
        raise find_argument(ArgumentError(name, None, "a value other than null", hint), config.as_dict()) from None
    finally:
        set_parsing_settings(unset_sentinel=False)


def check_lightning_arguments(seed_everything: Any, trainer: dict[str, Any]) -> None:
    """Check the seed of a run, and the trainer's arguments.

    Args:
        seed_everything: True for any seed; False for none.
        trainer: Arguments of the trainer. Those that are not there are not checked.

    Raises:
        ArgumentError: If an argument is out of its range.
    """
    if not isinstance(seed_everything, bool):
        none = "no seed"
        check_number("seed_everything", seed_everything, at_least=0, at_most=2**32 - 1, integer=True, none=none)
    fast = trainer.get("fast_dev_run", False)
    if not isinstance(fast, bool):
        check_number("fast_dev_run", fast, at_least=0, at_most=MOST_BATCHES, integer=True)
    counts = {
        "accumulate_grad_batches": (1, ""),
        "check_val_every_n_epoch": (1, "validation after val_check_interval batches"),
        "log_every_n_steps": (0, "50"),
        "max_epochs": (-1, "1000, or as max_steps says"),
        "max_steps": (-1, ""),
        "min_epochs": (0, "none"),
        "min_steps": (0, "none"),
        "num_nodes": (1, ""),
        "num_sanity_val_steps": (-1, "2"),
        "reload_dataloaders_every_n_epochs": (0, ""),
    }
    for name in counts.keys() & trainer.keys():
        least, none = counts[name]
        check_number(name, trainer[name], at_least=least, integer=True, none=none)
    check_number("gradient_clip_val", trainer.get("gradient_clip_val"), at_least=0, none="no clipping")
    for name in ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"):
        _check_batches(name, trainer.get(name))
    _check_batches("overfit_batches", trainer.get("overfit_batches"))
    _check_batches("val_check_interval", trainer.get("val_check_interval"))


def _check_batches(name: str, value: Any) -> None:
    """Check a limit of batches. Other than numbers, val_check_interval may be a time, which Lightning checks."""
    if isinstance(value, int | float):
        ok = 0 <= value <= 1 or (value % 1 == 0 and 1 < value <= MOST_BATCHES)
        ok = ok and not isinstance(value, bool) and (value > 0 or name != "val_check_interval")
        check(ok, name, value, f"a share from 0.0 to 1.0 of the batches, or a number of batches up to {MOST_BATCHES:g}")
