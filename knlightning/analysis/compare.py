"""Compare normalizations at given batch sizes by the paper's protocol, from one configuration file.

For each normalization and batch size the learning rate is halved until the best has been passed; then that rate is
repeated with further seeds (Nasirigerdeh et al., TMLR 2024, section 4.1). Unlike in the paper, the rate is chosen by
accuracy on validation images, which are neither trained on nor reported.

    python -m knlightning.analysis.compare --experiment configs/quickstart.yaml --batch_sizes 2
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import auto_cli

from knlightning.cli import run
from knlightning.run_directory import checkpoint_in, replacing


@dataclass(frozen=True)
class Trial:
    """One run: its settings, and its accuracy once it is done."""

    norm: str
    batch_size: int
    rate: float
    seed: int


def run_trial(trial: Trial, config: Path, out: Path, epochs: int, val_split: float) -> dict[str, float]:
    """Train and test, or go on with what an interrupted comparison has left.

    Args:
        trial: the settings that differ from the configuration.
        config: configuration of a classification run whose backbone has an argument `norm`.
        out: directory in which the run gets its own.
        epochs: epochs of training.
        val_split: share of the training images that is held out for validation.

    Returns:
        accuracies in [0, 1] after the last epoch: "val" and "test".
    """
    directory = out / f"{trial.norm}-batch{trial.batch_size}-rate{trial.rate:g}-seed{trial.seed}"
    result = directory / "result.json"
    if result.is_file():
        return json.loads(result.read_text())
    settings = [
        f"--config={config}",
        f"--run_dir={directory}",
        f"--seed_everything={trial.seed}",
        f"--model.init_args.backbone.init_args.norm={trial.norm}",
        f"--model.init_args.optimizer.init_args.lr={trial.rate}",
        f"--data.init_args.batch_size={trial.batch_size}",
        f"--data.init_args.val_split={val_split}",
        f"--trainer.max_epochs={epochs}",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]
    resume = ["--ckpt_path=last"] if checkpoint_in(directory, "last").is_file() else []
    trained = run(["fit", *settings, *resume]).trainer.callback_metrics
    tested = run(["test", *settings, "--ckpt_path=last"]).trainer.callback_metrics
    accuracies = {"val": trained["val/acc"].item(), "test": tested["test/acc"].item()}
    with replacing(result) as file:
        file.write_text(json.dumps(accuracies))
    return accuracies


def search_rate(norm: str, batch_size: int, start: float, config: Path, out: Path, epochs: int, split: float) -> float:
    """Halve the learning rate from `start` until the validation accuracy falls, ten times at most.

    Returns:
        the best rate; of equally good ones the highest.
    """
    best, best_accuracy = start, -1.0
    for halvings in range(11):
        rate = start / 2**halvings
        accuracy = run_trial(Trial(norm, batch_size, rate, 0), config, out, epochs, split)["val"]
        if accuracy < best_accuracy:
            break
        if accuracy > best_accuracy:
            best, best_accuracy = rate, accuracy
    return best


def compare(
    experiment: Path,
    norms: tuple[str, ...] = ("kernel", "batch"),
    batch_sizes: tuple[int, ...] = (2, 32),
    seeds: int = 3,
    epochs: int = 8,
    start_rate: float = 0.05,
    val_split: float = 0.2,
    out: Path = Path("runs/compare"),
) -> None:
    """Compare normalizations at several batch sizes; print a table of test accuracies.

    Args:
        experiment: configuration file of a classification run whose backbone has an argument `norm`.
        norms: names of the normalizations.
        batch_sizes: batch sizes of training.
        seeds: number of runs with the best rate; at least 2, for a standard deviation.
        epochs: epochs of each run.
        start_rate: the learning rate at which the search begins.
        val_split: share of the training images that is held out for choosing the rate.
        out: directory of the runs; if it holds some already, they are not repeated.

    Raises:
        ValueError: if an argument is out of its range.
    """
    if seeds < 2:
        raise ValueError(f"seeds must be at least 2, got {seeds}: the table shows standard deviations")
    if not 0.0 < val_split < 1.0:
        raise ValueError(f"val_split must be in (0, 1), got {val_split}: the learning rate is chosen by these images")
    rows = []
    for norm in norms:
        for size in batch_sizes:
            rate = search_rate(norm, size, start_rate, experiment, out, epochs, val_split)
            runs = [
                run_trial(Trial(norm, size, rate, seed), experiment, out, epochs, val_split) for seed in range(seeds)
            ]
            test = [100 * r["test"] for r in runs]
            rows.append((norm, size, rate, statistics.mean(test), statistics.stdev(test)))
    print(f"Test accuracy in %, mean ± SD of {seeds} seeds after {epochs} epochs\n")
    print("| normalization | batch size | learning rate | test accuracy |\n| --- | --- | --- | --- |")
    for norm, size, rate, mean, deviation in rows:
        print(f"| {norm} | {size} | {rate:g} | {mean:.2f} ± {deviation:.2f} |")


if __name__ == "__main__":
    auto_cli(compare, as_positional=False)
