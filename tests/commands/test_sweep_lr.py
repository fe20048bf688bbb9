import csv
import json
import statistics
from pathlib import Path

import pytest
from standins import assert_same_weights, knl, tiny_config, write_config

from knlightning.analysis.search import Search, Trial
from knlightning.commands import sweep_lr as module
from knlightning.commands import trials
from knlightning.commands.main import main
from knlightning.privacy.accounting import epsilon

FEW = ["--trainer.limit_train_batches=4", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches", "1"]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder to work in, with tiny.yaml."""
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "tiny.yaml", tiny_config(max_epochs=1))
    return tmp_path


def forbid_runs(monkeypatch):
    def run(args):
        raise AssertionError(f"started again: {args}")

    monkeypatch.setattr(trials, "FitCLI", run)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_finds_repeats_and_tells(tiny, capsys):
    main(["sweep-lr", "--config", "tiny.yaml", "--start=1e-6", "--seeds", "2", "--max_halvings", "1", *FEW])
    printed = capsys.readouterr().out
    out = tiny / "runs" / "sweep-lr" / "tiny"
    table = rows(out / "trials.csv")
    assert [(float(row["learning_rate"]), row["seed"]) for row in table[:2]] == [(1e-6, "0"), (5e-7, "0")]
    assert table[2]["seed"] == "1"
    for row in table:
        result = json.loads((tiny / row["directory"] / "result.json").read_text())
        assert (float(row["val"]), float(row["test"])) == (result["accuracies"]["val"], result["accuracies"]["test"])
        assert f"| {float(row['learning_rate']):g} | {row['seed']} | {100 * float(row['val']):.2f} |" in printed
    assert [row["directory"] for row in rows(out / "results.csv")] == [row["directory"] for row in table]
    test = [100 * float(row["test"]) for row in table if row["learning_rate"] == table[2]["learning_rate"]]
    assert f"Test accuracy:      {statistics.mean(test):.2f} ± {statistics.stdev(test):.2f} %" in printed
    assert (out / "rates.png").read_bytes().startswith(b"\x89PNG")
    assert "ATTENTION" not in printed


def test_the_command_again_repeats_nothing(tiny, monkeypatch, capsys):
    args = ["sweep-lr", "--config", "tiny.yaml", "--start=1e38", "--seeds", "1", "--max_halvings", "0", *FEW]
    main(args)
    first = rows(tiny / "runs" / "sweep-lr" / "tiny" / "trials.csv")
    assert [row["diverged"] for row in first] == ["True"]
    assert "| 1e+38 | 0 | diverged | diverged |" in capsys.readouterr().out
    forbid_runs(monkeypatch)
    main(args)
    assert rows(tiny / "runs" / "sweep-lr" / "tiny" / "trials.csv") == first


def test_an_interrupted_trial_goes_on(tiny, monkeypatch, capsys):
    args = ["sweep-lr", "--config=tiny.yaml", "--start=0.1", "--seeds=1", "--max_halvings=1", *FEW]
    args += ["--trainer.max_epochs=2"]
    main([*args, "--out=whole"])
    interrupt = {"class_path": "standins.Interrupt", "init_args": {"step": 6}}  # in the second of two epochs
    write_config(tiny / "tiny.yaml", tiny_config(callbacks=[interrupt]))
    with pytest.raises(SystemExit) as stop:
        main([*args, "--out=halted"])
    assert stop.value.code == 130
    assert "The same command again goes on where it was." in capsys.readouterr().out
    assert not (tiny / "halted" / "trials.csv").exists()

    write_config(tiny / "tiny.yaml", tiny_config())
    started = []
    original = trials.FitCLI
    monkeypatch.setattr(trials, "FitCLI", lambda line: started.append(line) or original(line))
    main([*args, "--out=halted"])
    assert ["--ckpt_path=last" in line for line in started] == [True, False]
    for rate in ("0.1", "0.05"):
        last = Path(f"rate{rate}-seed0/checkpoints/last.ckpt")
        assert_same_weights("whole" / last, "halted" / last)


def test_choosing_by_test_images_is_said_twice(tiny, capsys):
    found = module.sweep_lr(
        Path("tiny.yaml"), 1e-6, 1, val_split=0.0, max_halvings=0, overrides={"trainer.limit_train_batches": "1"}
    )
    assert capsys.readouterr().out.count("ATTENTION: val_split is 0.") == 2
    assert found.trials[0].val == found.trials[0].test


def test_the_epsilon_of_the_whole_search_is_told(tiny, capsys):
    init_args = {"noise_multiplier": 1.0, "target_delta": 1e-4, "accountant": "rdp", "check": False}
    callback = {"class_path": "knlightning.privacy.DifferentialPrivacy", "init_args": init_args}
    write_config(tiny / "tiny.yaml", tiny_config(callbacks=[callback], max_epochs=1))
    main(["sweep-lr", "--config=tiny.yaml", "--start=1e-6", "--seeds=1", "--max_halvings=1", *FEW])
    printed = capsys.readouterr().out
    runs = [tiny / "runs" / "sweep-lr" / "tiny" / f"rate{rate}-seed0" for rate in ("1e-06", "5e-07")]
    histories = [json.loads((run / "privacy.json").read_text())["history"] for run in runs]
    (noise, probability, steps), _ = [phase for history in histories for phase in history]
    whole, one = (epsilon([(noise, probability, count)], 1e-4, "rdp") for count in (2 * steps, steps))
    assert f"Privacy of the whole search: epsilon {whole:.3f} at delta 0.0001 (rdp) for all 2 runs" in printed
    assert f"up to {one:.3f} for one of them alone" in printed
    for run in runs:
        assert "part_of_search" in json.loads((run / "privacy.json").read_text())


@pytest.mark.slow
def test_two_processes_search_together(tiny):
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    args = ["--config=tiny.yaml", "--start=1e-6", "--seeds=1", "--max_halvings=1", *FEW, *two]
    process = knl("sweep-lr", *args, cwd=tiny)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("Best learning rate") == 1
    for rate in ("1e-06", "5e-07"):
        run = tiny / "runs" / "sweep-lr" / "tiny" / f"rate{rate}-seed0"
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_norm_and_batch_size_reach_the_runs(tmp_path, monkeypatch):
    seen = []

    def search(trials, config, out, settings, *_, ahead):
        seen.append({"out": out, **settings})
        return Search([Trial(0.1, 0, 0.5, 0.5, False, tmp_path)], 0.1, [])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "run_search", search)
    Path("a.yaml").touch()
    main(["sweep-lr", "--config=a.yaml", "--norm=group", "--batch_size=2", "--val_split=null", "--data.root", "x"])
    assert seen == [
        {
            "out": Path("runs/sweep-lr/a-group-batch2"),
            "model.init_args.backbone.init_args.norm": "group",
            "data.init_args.batch_size": 2,
            "data.root": "x",
        }
    ]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--seeds=0"], "--seeds must be a whole number at least 1, got 0"),
        (["--patience=0"], "--patience must be a whole number at least 1, got 0"),
        (["--max_halvings=-1"], "--max_halvings must be a whole number at least 0, got -1"),
        (["--start=0"], "--start must be a number above 0, got 0.0"),
        (["--norm=batches"], "local_context"),
        (["--model.optimizer.lr=1"], "model.optimizer.lr is settled by this command"),
        (["--data.init_args.val_split=0.5"], "data.init_args.val_split is settled by this command"),
        (["--data.batchsize=5"], "batchsize"),
        (["--batchsize=5"], "batchsize"),
    ],
)
def test_wrong_arguments(tiny, capsys, args, said):
    with pytest.raises(SystemExit) as stop:
        main(["sweep-lr", "--config", "tiny.yaml", *args])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tiny.rglob("*.ckpt"))
