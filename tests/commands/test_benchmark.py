import csv
import json

import pytest

from knlightning.analysis.variants import Case
from knlightning.commands import benchmark as module
from knlightning.commands.benchmark import benchmark, beside_batch, main, memory_of


def test_memory_of_segmentation_is_told(tmp_path, capsys, monkeypatch):
    few = [Case("fcn_resnet18", variant, 32, 2) for variant in ("kernel", "batch")]
    monkeypatch.setattr(module, "list_cases", lambda *args: few)
    settings = ["--resolutions=[32]", "--batch_size=2", "--device=cpu", "--variants=[kernel,batch]"]
    main(["--preset=table3", *settings, f"--out={tmp_path}"])
    printed = capsys.readouterr().out
    for row in json.loads((tmp_path / "table3.json").read_text())["rows"]:
        kept, maps = row["kept_over_batch"], row["evaluation_maps"]
        assert f"{row['variant']}: keeps {kept:.2f} times what batch keeps for backward; evaluation of a" in printed
        assert f"peaks at {maps:.1f} of its largest feature maps" in printed
        assert kept < 1.35
    row = dict.fromkeys(row) | {"variant": "batch", "status": "out of memory"}
    assert memory_of(row) == "batch: out of memory"


def test_converted_networks_are_told_beside_batch():
    row = {"variant": "kernel", "status": "ok", "step_ms_over_batch": 1.234, "kept_over_batch": 1.0}
    told = beside_batch(row | {"evaluation_ms_over_batch": None})
    assert told == "kernel, relative to batch: a training step 1.23, bytes kept for backward 1.00"
    nothing = dict.fromkeys([key for key in row if "batch" in key] + ["evaluation_ms_over_batch"])
    assert beside_batch(nothing | {"variant": "group", "status": "out of memory"}).endswith("batch: out of memory")


def test_a_run_prints_a_table_and_writes_files(tmp_path, capsys):
    settings = ["--resolutions=[16]", "--batch_size=1", "--rounds=1", "--device=cpu", "--variants=[floor,kernel]"]
    main(["--preset=table8", *settings, f"--out={tmp_path / 'new'}"])
    printed = capsys.readouterr().out
    assert "processor: " in printed
    assert "4 layers 3x3, 256 filters, stride 3, 16x16, batch 1" in printed
    assert "(1.00x)" in printed
    stored = json.loads((tmp_path / "new" / "table8.json").read_text())
    assert stored["machine"]["torch"]
    assert stored["rounds"] == 1
    assert len(stored["rows"]) == 6
    with (tmp_path / "new" / "table8.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == ["floor", "kernel"] * 3
    assert all(float(row["kept_over_floor"]) >= 1 for row in rows)
    assert (tmp_path / "new" / "table8.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "new").iterdir())) == 3  # nothing temporary is left


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number at least 1, or null for that of the preset, got 0"),
        ({"rounds": -1}, "rounds must be a whole number at least 0, .*, got -1"),
        ({"resolutions": [8]}, r"resolutions must be a list of numbers of at least 16.*got \[8\]"),
        ({"resolutions": [32], "preset": "targets"}, r"resolutions must be null for the preset targets, got \[32\]"),
        ({"preset": "gpu", "device": "cpu"}, "preset must be another one, got 'gpu'. This one needs a GPU"),
        ({"variants": []}, "variants must be some of floor, kernel"),
        (
            {"variants": ["batch"], "preset": "table8"},
            "variants must be some of floor, kernel, algorithm1 for the preset table8",
        ),
        (
            {"variants": ["batch-primitives"], "preset": "table3"},
            "variants must be some of floor, kernel, algorithm1, batch, group, layer for the preset table3",
        ),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmark(**arguments)


def test_the_preset_for_gpus_checks_parity_first(tmp_path, monkeypatch, capsys):
    parity = [{"fused": 0.25, "plain": 0.5, "ok": True}]

    class FakeWorker:
        def ask(self, function, *args):
            return parity

        def close(self):
            pass

    run_setting = module.run_setting
    case = Case("layers", "kernel", 16, 1, 3, precision="bfloat16")
    fakes = {
        "Worker": FakeWorker,
        "choose_device": lambda device: "cuda",
        "machine": lambda device: {},
        "list_cases": lambda *args: [case],
        "run_setting": lambda cases, rounds, device, last: run_setting(cases, 1, "cpu", last),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(module, name, fake)
    (row,) = benchmark(preset="gpu", out=tmp_path)
    assert row["images_per_second"] > 0
    assert row["setting"].endswith("16x16, batch 1, bfloat16")
    assert json.loads((tmp_path / "gpu.json").read_text())["parity"] == parity
    assert "fused: 0.25, plain: 0.5, ok: True" in capsys.readouterr().out
    parity[0]["ok"] = False
    with pytest.raises(RuntimeError, match="the fused kernels and the plain operations disagree"):
        benchmark(preset="gpu", out=tmp_path)


def test_a_missing_gpu_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        main(["--device=cuda"])
    assert (
        "knl benchmark: error: --device must be cpu or auto, got 'cuda'. torch finds no GPU here"
        in capsys.readouterr().err
    )
