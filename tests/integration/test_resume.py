"""An interrupted and resumed run ends where a run left alone ends, bit for bit."""

import csv
import re
import shutil

import pytest
import torch
from standins import assert_same_weights, tiny_config, write_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from knlightning.commands.main import main

# 1437 images in batches of 64: 23 steps an epoch, of which the network with dropout sees all or the first 8
CASES = {
    "epoch end": ({}, 8, 8),
    "before the first checkpoint of the epoch": ({}, 11, 8),
    "mid-epoch": ({"last_checkpoint": {"every_n_steps": 3}}, 13, 12),
    "mid-epoch, workers": ({"last_checkpoint": {"every_n_steps": 3}, "workers": 1}, 13, 12),
    "mid-epoch, schedule by step": ({"last_checkpoint": {"every_n_steps": 1}, "interval": "step"}, 14, 14),
    "mid-epoch, two batches a step": (
        {"last_checkpoint": {"every_n_steps": 1}, "trainer": {"accumulate_grad_batches": 2}},
        6,
        6,
    ),
    "mid-epoch, validation within the epoch": (
        {"last_checkpoint": {"every_n_steps": 3}, "trainer": {"val_check_interval": 4}},
        10,
        9,
    ),
    "kernel normalization": (
        {"last_checkpoint": {"every_n_steps": 3}, "backbone": "knlightning.models.knresnet8", "batch_size": 4},
        10,
        9,
    ),
    "mixup, cutmix, norms apart, warm-up": (
        {
            "last_checkpoint": {"every_n_steps": 3},
            "backbone": "knlightning.models.resnet8",
            "batch_size": 4,
            "task": {"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "norm_weight_decay": 0.0, "bias_weight_decay": 0.0},
            "schedule": {"warmup": 12},
            "interval": "step",
        },
        10,
        9,
    ),
    "averaged weights": (
        {
            "last_checkpoint": {"every_n_steps": 3},
            "callbacks": [
                {
                    "class_path": "knlightning.callbacks.EMA",
                    "init_args": {"decay": 0.8, "every_n_steps": 2, "start_epoch": 1},
                }
            ],
        },
        13,
        12,
    ),
}


def rows(run):
    """What each step has logged, without the clock's part."""
    clock = ("train/images_per_s", "train/seconds")
    with (run / "metrics.csv").open(newline="") as file:
        return [
            {name: value for name, value in row.items() if value and name not in clock} for row in csv.DictReader(file)
        ]


def curve(run):
    """The losses that TensorBoard shows, step by step."""
    ordered = run / "ordered"  # names of two files that one process made within a second are in no order
    ordered.mkdir()
    for number, file in enumerate(sorted(run.glob("events*"), key=lambda file: file.stat().st_mtime)):
        shutil.copy(file, ordered / f"events.out.tfevents.{number}")
    events = EventAccumulator(str(ordered), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss_step")]


@pytest.mark.parametrize(("change", "interrupted", "resumed"), CASES.values(), ids=CASES)
def test_resumed_run_equals_the_whole_one(tmp_path, monkeypatch, capsys, change, interrupted, resumed):
    monkeypatch.chdir(tmp_path)
    config = tiny_config(limit_train_batches=8, limit_val_batches=2, log_every_n_steps=1, **change.get("trainer", {}))
    task, data = config["model"]["init_args"], config["data"]["init_args"]
    data["batch_size"] = change.get("batch_size", 64)
    data["num_workers"] = change.get("workers", 0)
    task["lr_scheduler_interval"] = change.get("interval", "epoch")
    task["lr_scheduler"]["init_args"].update(change.get("schedule", {}))
    task.update(change.get("task", {}))
    if "backbone" in change:
        task["backbone"] = {"class_path": change["backbone"], "init_args": {"num_classes": 10, "low_resolution": False}}
        task["optimizer"]["init_args"]["lr"] = 0.05
    config["last_checkpoint"] = change.get("last_checkpoint", {})
    config["trainer"]["callbacks"] = change.get("callbacks", [])
    write_config(tmp_path / "a.yaml", config)

    main(["fit", "--config", "a.yaml", "--run_dir", "whole"])
    interrupt = {"class_path": "standins.Interrupt", "init_args": {"step": interrupted}}
    config["trainer"]["callbacks"] = [*config["trainer"]["callbacks"], interrupt]
    write_config(tmp_path / "b.yaml", config)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "b.yaml", "--run_dir", "parts"])
    assert stop.value.code == 130
    last = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == resumed
    torch.manual_seed(123)  # another process would have other random numbers, too
    main(["fit", "--config", "a.yaml", "--run_dir", "parts", "--ckpt_path", "last"])

    whole = tmp_path / "whole" / "checkpoints" / "last.ckpt"
    assert_same_weights(last, whole)
    one, other = (torch.load(path, weights_only=True) for path in (last, whole))
    keys = {"optimizer_states", "lr_schedulers", "global_step", "epoch", "current_model_state", "averaging_state"}
    assert one.keys() == other.keys() >= keys - {"current_model_state", "averaging_state"}  # these of averages alone
    for key in keys & other.keys():
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)
    if resumed % 8 == 0:
        assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
        assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    else:  # the epoch's training metrics cover its second part alone: compare what was logged, and all else
        steps = [[(row["step"], *sorted(row)) for row in rows(tmp_path / run)] for run in ("parts", "whole")]
        if "val_check_interval" not in change.get("trainer", {}):
            assert steps[0] == steps[1]
            assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
        scores = [[row["val/loss"] for row in rows(tmp_path / run) if "val/loss" in row] for run in ("parts", "whole")]
        assert set(scores[0]) <= set(scores[1])
        assert scores[0][-1] == scores[1][-1]


def stop_after(batch, *callbacks):
    return {"callbacks": [*callbacks, {"class_path": "standins.Stop", "init_args": {"batch": batch}}]}


# without trial steps, which draw random numbers before the first batch of a resumed run
PRIVATE = {
    "class_path": "knlightning.privacy.DifferentialPrivacy",
    "init_args": {"noise_multiplier": 0.5, "target_delta": 1e-4, "physical_batch_size": 32, "seed": 1, "check": False},
}


@pytest.mark.parametrize(
    ("trainer", "stop", "stopped"),
    [
        ({}, {"max_steps": 11}, 11),
        ({}, {"max_steps": 16}, 16),  # between two epochs
        ({"val_check_interval": 4}, {"max_steps": 12}, 12),  # after a validation within the epoch
        ({}, stop_after(13), 13),
        ({"accumulate_grad_batches": 3}, stop_after(10), 4),  # the step is taken first: 3 steps of 8 batches an epoch
        ({"callbacks": [PRIVATE]}, stop_after(19, PRIVATE), 10),  # of 2 micro-batches
    ],
    ids=["steps", "end of epoch", "validation", "told", "accumulating", "private"],
)
def test_run_stopped_within_an_epoch_goes_on_at_its_next_batch(tmp_path, monkeypatch, trainer, stop, stopped):
    monkeypatch.chdir(tmp_path)
    config = tiny_config(limit_train_batches=8, limit_val_batches=2, log_every_n_steps=1, **trainer)
    write_config(tmp_path / "a.yaml", config)
    main(["fit", "--config", "a.yaml", "--run_dir", "whole"])
    config["trainer"].update(stop)
    write_config(tmp_path / "b.yaml", config)
    main(["fit", "--config", "b.yaml", "--run_dir", "parts"])
    whole, last = (tmp_path / run / "checkpoints" / "last.ckpt" for run in ("whole", "parts"))
    assert torch.load(last, weights_only=True)["global_step"] == stopped
    torch.manual_seed(123)
    main(["fit", "--config", "a.yaml", "--run_dir", "parts", "--ckpt_path", "last"])

    assert_same_weights(last, whole)
    one, other = (torch.load(path, weights_only=True) for path in (last, whole))
    for key in ("optimizer_states", "lr_schedulers", "global_step", "epoch"):
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_run_goes_on_behind_the_last_batch_of_an_epoch(tmp_path, monkeypatch, capsys):
    """From the best checkpoint, which is written within the validation where not every epoch has one."""
    monkeypatch.chdir(tmp_path)
    few = {"limit_train_batches": 3, "limit_val_batches": 1, "check_val_every_n_epoch": 2, "enable_progress_bar": True}
    write_config(tmp_path / "a.yaml", tiny_config(**few))
    main(["fit", "--config", "a.yaml", "--run_dir", "whole"])
    capsys.readouterr()
    main(["fit", "--config", "a.yaml", "--run_dir", "parts", "--ckpt_path", "whole/checkpoints/best.ckpt"])
    assert re.findall(r"^Epoch \d", capsys.readouterr().out, re.M) == ["Epoch 2"]
    whole, last = (torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True) for run in ("whole", "parts"))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        torch.testing.assert_close(last[key], whole[key], rtol=0, atol=0)
    of_epoch = [row for row in rows(tmp_path / "whole") if row.get("epoch") == "2"]
    assert [row for row in rows(tmp_path / "parts") if "epoch" in row] == of_epoch


def test_the_network_of_these_tests_draws_random_numbers(tmp_path, monkeypatch):
    """Else equal weights would prove little."""
    monkeypatch.chdir(tmp_path)
    few = tiny_config(max_epochs=1, limit_train_batches=3, limit_val_batches=1)
    write_config(tmp_path / "a.yaml", few)
    main(["fit", "--config", "a.yaml", "--run_dir", "one"])
    main(["fit", "--config", "a.yaml", "--run_dir", "two", "--model.backbone.dropout_p", "0"])
    one, two = (torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in ("one", "two"))
    assert not torch.equal(one["backbone.head.weight"], two["backbone.head.weight"])
