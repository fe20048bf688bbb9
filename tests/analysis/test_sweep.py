import csv
import json
import statistics
from collections.abc import Iterable
from pathlib import Path

import pytest
from standins import assert_same_weights, knl, tiny_config, write_config

from knlightning.analysis import sweep as module
from knlightning.analysis import trials
from knlightning.analysis.sweep import Search, Trial, draw_rates, search, sweep_lr, with_overrides
from knlightning.cli import main

FEW = ["--trainer.limit_train_batches=4", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches", "1"]
FEW += ["--pictures.every_n_epochs=0"]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with tiny.yaml."""
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "tiny.yaml", tiny_config(max_epochs=1))
    return tmp_path


def scripted(monkeypatch: pytest.MonkeyPatch, accuracies: Iterable[float | None], classes: int = 1000) -> list[float]:
    """Let runs reach the given accuracies in turn, None for one that diverges; return the list of rates asked for."""
    rates: list[float] = []
    given = iter(accuracies)

    def run_trial(directory: Path, config: Path, settings: dict) -> dict[str, float]:
        rates.append(settings[module.RATE])
        directory.mkdir(parents=True)
        backbone = {"init_args": {"num_classes": classes}}
        (directory / "config.yaml").write_text(json.dumps({"model": {"init_args": {"backbone": backbone}}}))
        accuracy = next(given)
        if accuracy is None:
            raise FloatingPointError("the training loss is nan")
        return {"val": accuracy, "test": accuracy / 2}

    monkeypatch.setattr(module, "run_trial", run_trial)
    return rates


def forbid_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: list[str]) -> None:
        raise AssertionError(f"started again: {args}")

    monkeypatch.setattr(trials, "run", run)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# where the search goes, and where it ends


@pytest.mark.parametrize(
    ("accuracies", "best", "note"),
    [
        ([0.5, 0.6, 0.7, 0.6], 0.05, None),
        ([0.9, 0.8], 0.2, "higher --start"),
        ([0.1, 0.1, 0.8, 0.8, 0.7], 0.05, None),  # equally good: the highest
        ([None, None, 0.6, 0.7, 0.5], 0.025, None),
        ([0.6, 0.7, None], 0.1, None),
        ([0.3, 0.4, 0.5, 0.6, 0.7, 0.8], 0.00625, "not passed in 5 halvings"),
        ([None] * 6, 0.2, "more than guessing"),
    ],
)
def test_the_rate_is_halved_until_the_best_is_passed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, accuracies: list[float | None], best: float, note: str | None
) -> None:
    rates = scripted(monkeypatch, accuracies)
    found = search(Path("x.yaml"), tmp_path, {}, start=0.2, seeds=1, max_halvings=5)
    assert rates == [0.2 / 2**k for k in range(len(accuracies))]
    assert found.rate == best
    assert [trial.val for trial in found.trials] == [accuracy or 0.0 for accuracy in accuracies]
    assert [trial.diverged for trial in found.trials] == [accuracy is None for accuracy in accuracies]
    text = " ".join(found.notes)
    assert (note in text) if note else ("diverged" in text or not text)


def test_patience_looks_beyond_a_single_worse_rate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rates = scripted(monkeypatch, [0.5, 0.4, 0.6, 0.5, 0.55])
    assert search(Path("x.yaml"), tmp_path, {}, start=0.2, seeds=1, patience=2).rate == 0.05
    assert len(rates) == 5


def test_a_rate_that_only_guesses_is_not_passed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of ten classes, 0.10 is guessing and 0.22 hardly better: what looks like a maximum is none."""
    scripted(monkeypatch, [0.22, 0.1, 0.1, 0.9, 0.8], classes=10)
    assert search(Path("x.yaml"), tmp_path, {}, start=0.2, seeds=1).rate == 0.025


def test_the_best_rate_is_repeated_with_further_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rates = scripted(monkeypatch, [0.5, 0.6, 0.4, 0.7, None])
    found = search(Path("x.yaml"), tmp_path, {}, start=0.2, seeds=3)
    assert rates[3:] == [0.1, 0.1]
    assert [(trial.seed, trial.test) for trial in found.repeats] == [(0, 0.3), (1, 0.35), (2, 0.0)]
    assert found.accuracy == f"{65 / 3:.2f} ± {statistics.stdev([30, 35, 0]):.2f}"
    assert found.notes == ["1 of the 3 runs with the best rate diverged and count as accuracy 0."]
    assert [row["directory"] for row in rows(tmp_path / "trials.csv")] == [str(t.directory) for t in found.trials]


# the command, with real runs


def test_the_command_finds_repeats_and_tells(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["sweep-lr", "--config", "tiny.yaml", "--start=1e-6", "--seeds", "2", "--max_halvings", "1", *FEW])
    printed = capsys.readouterr().out
    out = tiny / "runs" / "sweep-lr" / "tiny"
    table = rows(out / "trials.csv")
    assert [(float(row["rate"]), row["seed"]) for row in table[:2]] == [(1e-6, "0"), (5e-7, "0")]
    assert table[2]["seed"] == "1"
    for row in table:
        result = json.loads((tiny / row["directory"] / "result.json").read_text())
        assert (float(row["val"]), float(row["test"])) == (result["accuracies"]["val"], result["accuracies"]["test"])
        assert f"| {float(row['rate']):g} | {row['seed']} | {100 * float(row['val']):.2f} |" in printed
    test = [100 * float(row["test"]) for row in table if row["rate"] == table[2]["rate"]]
    assert f"Test accuracy:      {statistics.mean(test):.2f} ± {statistics.stdev(test):.2f} %" in printed
    assert (out / "rates.png").read_bytes().startswith(b"\x89PNG")
    assert "ATTENTION" not in printed


def test_the_command_again_repeats_nothing(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["sweep-lr", "--config", "tiny.yaml", "--start=1e38", "--seeds", "1", "--max_halvings", "0", *FEW]
    main(args)
    first = rows(tiny / "runs" / "sweep-lr" / "tiny" / "trials.csv")
    assert [row["diverged"] for row in first] == ["True"]
    assert "| 1e+38 | 0 | diverged | diverged |" in capsys.readouterr().out
    forbid_runs(monkeypatch)
    main(args)
    assert rows(tiny / "runs" / "sweep-lr" / "tiny" / "trials.csv") == first


def test_other_settings_in_the_same_directory_are_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["sweep-lr", "--config", "tiny.yaml", "--start=1e-6", "--seeds", "1", "--max_halvings", "0", *FEW]
    main(args)
    with pytest.raises(SystemExit):
        main([*args, "--batch_size", "32", "--out", "runs/sweep-lr/tiny"])
    assert "data.init_args.batch_size" in capsys.readouterr().err
    main([*args, "--batch_size", "32"])
    assert (tiny / "runs" / "sweep-lr" / "tiny-batch32" / "trials.csv").is_file()


def test_an_interrupted_trial_goes_on(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
    original = trials.run
    monkeypatch.setattr(trials, "run", lambda line: started.append(line) or original(line))
    main([*args, "--out=halted"])
    fits = [line for line in started if line[0] == "fit"]
    assert ["--ckpt_path=last" in line for line in fits] == [True, False]
    for rate in ("0.1", "0.05"):
        last = Path(f"rate{rate}-seed0/checkpoints/last.ckpt")
        assert_same_weights("whole" / last, "halted" / last)


def test_choosing_by_test_images_is_said_twice(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = sweep_lr(
        Path("tiny.yaml"), 1e-6, 1, val_split=0.0, max_halvings=0, overrides={"trainer.limit_train_batches": "1"}
    )
    assert capsys.readouterr().out.count("ATTENTION: --val_split 0.") == 2
    assert found.trials[0].val == found.trials[0].test


@pytest.mark.slow
def test_two_processes_search_together(tiny: Path) -> None:
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    args = ["--config=tiny.yaml", "--start=1e-6", "--seeds=1", "--max_halvings=1", *FEW, *two]
    process = knl("sweep-lr", *args, cwd=tiny)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("Best learning rate") == 1
    for rate in ("1e-06", "5e-07"):
        run = tiny / "runs" / "sweep-lr" / "tiny" / f"rate{rate}-seed0"
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


# arguments


def test_norm_and_batch_size_reach_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict] = []

    def search(config: Path, out: Path, settings: dict, *_: object) -> Search:
        seen.append({"out": out, **settings})
        return Search([Trial(0.1, 0, 0.5, 0.5, False, tmp_path)], 0.1, [])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "search", search)
    main(["sweep-lr", "--config=a.yaml", "--norm=group", "--batch_size=2", "--val_split=null", "--data.root", "x"])
    assert seen == [
        {
            "out": Path("runs/sweep-lr/a-group-batch2"),
            "trainer.enable_model_summary": "false",
            "model.init_args.backbone.init_args.norm": "group",
            "data.init_args.batch_size": 2,
            "data.root": "x",
        }
    ]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--seeds=0"], "--seeds must be at least 1, got 0"),
        (["--patience=0"], "--patience must be at least 1, got 0"),
        (["--max_halvings=-1"], "--max_halvings must be at least 0, got -1"),
        (["--start=0"], "--start must be above 0, got 0.0"),
        (["--norm=batches"], "local_context"),
        (["--model.optimizer.lr=1"], "--model.optimizer.lr is settled by this command"),
        (["--data.init_args.val_split=0.5"], "--data.init_args.val_split is settled by this command"),
        (["--data.batchsize=5"], "batchsize"),
        (["--batchsize=5"], "batchsize"),
    ],
)
def test_wrong_arguments(tiny: Path, capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["sweep-lr", "--config", "tiny.yaml", *args])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tiny.rglob("*.ckpt"))


def test_overrides_are_added_where_the_command_settles_nothing() -> None:
    assert with_overrides({"data.init_args.batch_size": 2}, {"data.root": "x"}) == {
        "data.init_args.batch_size": 2,
        "data.root": "x",
    }
    with pytest.raises(ValueError, match=r"--data\.batch_size is settled"):
        with_overrides({"data.init_args.batch_size": 2}, {"data.batch_size": "4"})


def test_plot_shows_all_rates_and_the_spread_of_the_best() -> None:
    trials = [
        Trial(0.2, 0, 0.0, 0.0, True, Path("a")),
        Trial(0.1, 0, 0.8, 0.7, False, Path("b")),
        Trial(0.05, 0, 0.6, 0.5, False, Path("c")),
        Trial(0.1, 1, 0.6, 0.9, False, Path("d")),
    ]
    figure = draw_rates(Search(trials, 0.1, []))
    (axes,) = figure.axes
    validation, test = axes.lines[:2]
    assert validation.get_xydata().tolist() == [[0.05, 60], [0.1, 80], [0.2, 0]]
    assert test.get_xydata().tolist() == [[0.05, 50], [0.1, 70], [0.2, 0]]
    assert axes.containers[0].lines[0].get_xydata().tolist() == [[0.1, 80]]
    assert [text.get_text() for text in axes.texts] == ["diverged"]
