import json

import pytest
from standins import PROJECT

from knlightning.analysis.paper import ROWS, rows_of
from knlightning.commands import reproduction
from knlightning.commands.main import main
from knlightning.commands.reproduction import Reproduction
from knlightning.commands.trials import record


@pytest.fixture
def trials(monkeypatch):
    """Runs that are not trained: their directories, in their order."""
    monkeypatch.chdir(PROJECT)
    done = []

    def run_trial(directory, config, settings):
        done.append(directory)
        if "layer" in directory.parent.name:
            raise FloatingPointError("the loss is nan")
        directory.mkdir(parents=True)
        (directory / "metrics.csv").write_text(
            "step,val/acc,epoch,train/loss\n" + "".join(f"{e},0.{e + len(done) % 3},{e},1\n" for e in range(1, 4))
        )
        accuracies = {"val": 0.5, "test": 0.5 + len(done) / 100}
        record(directory, config, settings, accuracies, seconds=60.0)
        return accuracies

    monkeypatch.setattr("knlightning.commands.trials.run_trial", run_trial)
    return done


def verdicts(out):
    return {(f["section"], *f["labels"].values()): f for f in json.loads((out / "findings.json").read_text())}


def test_a_table_is_reported_after_each_run(tmp_path, trials, capsys):
    main(["reproduce", "--table", "cifar10", "--seeds=2", f"--out={tmp_path}", "--data.root=data"])
    found = verdicts(tmp_path)
    assert found["cifar10", "resnet18", "group", "128"] | {"verdict": ""} == {
        "section": "cifar10",
        "labels": {"network": "resnet18", "norm": "group", "batch size": "128"},
        "published": "90.58",
        "ours": "53.50 ± 0.71 (2)",
        "difference": "-37.08",
        "verdict": "",
        "command": "knl reproduce --table cifar10 --backbone resnet18 --norm group --seeds 2"
        f" --out {tmp_path} --data.root data",
        "seconds": 120.0,
    }
    assert found["cifar10", "resnet18", "layer", "128"]["ours"] == "0.00 ± 0.00 (2)"  # it has diverged
    assert "the loss is nan" in capsys.readouterr().out
    trials.clear()
    main(["reproduce", "--figure=4", "--scale=tiny", f"--out={tmp_path}"])
    assert len(verdicts(tmp_path)) == 4 + 5  # what was found before stays; panels of three batch sizes, and two more
    assert "](figure4.png)" in (tmp_path / "report.md").read_text()
    assert "Figure 4" in (tmp_path / "report.html").read_text()


def test_other_settings_are_not_comparable_and_other_devices_are(tmp_path):
    def obstacle(**overrides):
        return Reproduction(
            "paper", 3, tmp_path, {k.replace("_", ".", 1): v for k, v in overrides.items()}, ROWS
        ).obstacle

    assert obstacle(data_root="x", trainer_devices="2") == ""
    assert obstacle(data_root="x", trainer_max_epochs="1") == "other trainer.max_epochs"
    assert Reproduction("tiny", 3, tmp_path, {}, ROWS).obstacle == "tiny scale"


def test_costs_are_measured_once(tmp_path, monkeypatch):
    calls = []

    def benchmark(preset, variants, out, **settings):
        calls.append(settings)
        rows = [
            {"network": "layers", "variant": "kernel", "stride": 1, "resolution": size}
            | {"evaluation_ms": size, "evaluation_peak": size}
            for size in settings["resolutions"]
        ]
        out.joinpath(f"{preset}.json").write_text(json.dumps({"rows": rows}))

    monkeypatch.setattr(reproduction, "benchmark", benchmark)
    for _ in range(2):
        main(["reproduce", "--table=8", "--scale=tiny", f"--out={tmp_path}"])
    assert calls == [reproduction.TINY_BENCHMARKS["table8"]]
    assert verdicts(tmp_path)["8", "1", "64x64"]["ours"] == "2.00 / 2.00"


def test_all_goes_on_without_the_data_of_a_part(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Reproduction, "scores", lambda self, table: self.rows(table) and None)
    for name in ("learning_rates", "network_costs", "layer_costs", "convergence"):
        monkeypatch.setattr(Reproduction, name, lambda self: None)

    def landscape(self):
        raise FileNotFoundError("no CIFAR-10 in data")

    monkeypatch.setattr(Reproduction, "landscape", landscape)
    monkeypatch.chdir(PROJECT)
    main(["reproduce", "--all", f"--out={tmp_path}"])
    assert "figure 7 is left out: no CIFAR-10 in data" in capsys.readouterr().out


@pytest.mark.slow
def test_figures_and_searches_in_miniature(tmp_path, monkeypatch):
    monkeypatch.chdir(PROJECT)
    few = ["--scale=tiny", f"--out={tmp_path}", "--seeds=1", "--trainer.limit_train_batches=1"]
    main(["reproduce", "--figure=7", *few])
    main(["reproduce", "--table=5", "--norm=batch", *few])
    found = verdicts(tmp_path)
    assert {key[1] for key in found if key[0] == "figure 7"} == {"layer", "group", "batch", "kernel"}
    assert found["5", "resnet8", "batch", "32"]["published"] == f"{rows_of('1')[13].learning_rate:g}"
    assert (tmp_path / "landscape" / "surfaces.png").is_file()
