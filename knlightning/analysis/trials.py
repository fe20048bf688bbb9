"""Runs whose accuracies are compared: each with a directory of its own, trained and tested once."""

import json
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from knlightning.cli import run
from knlightning.run_directory import checkpoint_in, replacing

Value = str | int | float | bool
"""What a key of a configuration is set to."""

NORM = "model.init_args.backbone.init_args.norm"
DROPOUT = "model.init_args.backbone.init_args.dropout_p"
RATE = "model.init_args.optimizer.init_args.lr"
BATCH_SIZE = "data.init_args.batch_size"
VAL_SPLIT = "data.init_args.val_split"

FURTHER = ("pixel_acc", "mean_acc")
"""What is told of a segmentation run besides its mean IoU."""

RESULT = "result.json"
"""Written into the directory of a run once it has been tested: its settings, and what it has reached."""


def run_trial(directory: Path, config: Path, settings: Mapping[str, Value]) -> dict[str, float]:
    """Train and test, or go on with what an interruption has left; what is done already is not repeated.

    Args:
        directory: the run's own.
        config: configuration of the run.
        settings: what differs from it, by the dotted names of the command line, such as `data.init_args.batch_size`.

    Returns:
        Accuracies in [0, 1] of the weights after the last epoch: "val" and "test"; of a segmentation run these are the
        mean IoU, and there are "pixel_acc" and "mean_acc" on the test images too.

    Raises:
        ValueError: The directory holds the result of other settings.
        FloatingPointError: The loss is no longer finite.
    """
    plain = _plain(config, settings)
    path = directory / RESULT
    if path.is_file():
        result = json.loads(path.read_text())
        if result["settings"] != plain:
            differing = sorted(key for key, _ in result["settings"].items() ^ plain.items())
            raise ValueError(
                f"{path} is of a run that differs in {', '.join(dict.fromkeys(differing))}: choose another directory,"
                " or remove this one"
            )
        return result["accuracies"]
    line = [f"--{key}={value}" for key, value in plain.items()] + [f"--run_dir={directory}"]
    resume = ["--ckpt_path=last"] if checkpoint_in(directory, "last").is_file() else []
    run(["fit", *line, *resume])
    accuracies = {}
    for stage, command in (("val", "validate"), ("test", "test")):
        cli = run([command, *line, "--ckpt_path=last"])
        metrics = {name: value.item() for name, value in cli.trainer.callback_metrics.items()}
        accuracies[stage] = metrics[f"{stage}/{cli.model.main_metric}"]
    accuracies |= {name: metrics[f"test/{name}"] for name in FURTHER if f"test/{name}" in metrics}
    record(directory, config, settings, accuracies)
    return accuracies


@rank_zero_only
def record(directory: Path, config: Path, settings: Mapping[str, Value], accuracies: dict[str, float]) -> None:
    """Write down what a run has reached, so that `run_trial` takes it for done; arguments as there.

    Args:
        directory: the run's own.
        config: configuration of the run.
        settings: what differs from it.
        accuracies: what `run_trial` is to return for these settings.
    """
    with replacing(directory / RESULT) as file:
        file.write_text(json.dumps({"settings": _plain(config, settings), "accuracies": accuracies}, indent=1))


def _plain(config: Path, settings: Mapping[str, Value]) -> dict[str, str]:
    return {"config": str(config), **{key: str(value) for key, value in settings.items()}}
