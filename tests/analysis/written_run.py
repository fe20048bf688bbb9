"""The directory of a run without a training."""

import csv
import json

import torch
import yaml
from standins import tiny_config


def write_run(folder, classes=3, config=None):
    """Write the files of a run that was trained and tested."""
    (folder / "checkpoints").mkdir(parents=True)
    config = (config or tiny_config()) | {"best_checkpoint": {"monitor": "val/loss", "mode": "min"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = ["step,epoch,val/loss,val/acc", *(f"{4 * epoch},{epoch},{1 - epoch / 4},{epoch / 4}" for epoch in range(3))]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    weights = {"backbone.head.weight": torch.zeros(10, 48), "backbone.norm.running_mean": torch.zeros(7)}
    stored = {"epoch": 2, "global_step": 12, "state_dict": weights}
    torch.save(stored, folder / "checkpoints" / "best.ckpt")
    test = folder / "test"
    test.mkdir()
    report = {
        "scores": {"test/acc": 0.875, "test/loss": 0.25, "test/iou/cat": 0.5},
        "images": 40,
        "checkpoint": {"path": "x/best.ckpt", "epoch": 2, "global_step": 12},
        "expected_calibration_error": 0.0625,
        "date": "2026-01-02T03:04:05+00:00",
    }
    (test / "test.json").write_text(json.dumps(report))
    with (test / "classes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "precision", "recall", "f1", "support"])
        writer.writerows([f"<class {n}>", "" if n == 1 else 0.5, 0.25, n / classes, 7] for n in range(classes))
    return folder
