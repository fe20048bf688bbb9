import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from knlightning.analysis import benchmark as module
from knlightning.analysis.benchmark import KERNEL_VARIANTS, VARIANTS, benchmark, cases, main, median_ratio, run_setting
from knlightning.analysis.measure import start
from knlightning.analysis.variants import Case

TIMES = {  # milliseconds of three rounds
    ("floor", "step"): [100.0, 200.0, 400.0],
    ("kernel", "step"): [110.0, 260.0, 400.0],
    ("floor", "evaluation"): [10.0, 10.0, 10.0],
    ("kernel", "evaluation"): [20.0, 30.0, None],
}


def test_ratios_are_taken_within_a_round_of_all_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class FakeWorker:
        status = "ok"

        def ask(self, function: Callable, *args: Any) -> Any:
            if function is start:
                self.variant = args[0].variant
                return {"kept": 30 if self.variant == "kernel" else 20, "flops": 8}
            asked.append((self.variant, args[0]))
            return TIMES[asked[-1]][asked.count(asked[-1]) - 1]

        def close(self) -> None:
            pass

    monkeypatch.setattr(module, "Worker", FakeWorker)
    floor, kernel = run_setting([Case("layers", v, 32, 1) for v in ("floor", "kernel")], 3, "cpu", True)
    assert asked[:4] == [("floor", "step"), ("kernel", "step"), ("floor", "evaluation"), ("kernel", "evaluation")]
    assert (floor["step_ms"], kernel["step_ms"]) == (200.0, 260.0)
    assert kernel["step_ms_over_floor"] == 1.1  # of 1.1, 1.3 and 1: not 260 / 200
    assert kernel["evaluation_ms"] is kernel["evaluation_ms_over_floor"] is None
    assert (kernel["kept_over_floor"], kernel["kept_over_batch"], kernel["flops_over_floor"]) == (1.5, None, 1.0)


def test_no_ratio_without_a_floor() -> None:
    assert median_ratio([1.0], []) is None
    assert median_ratio([], []) is None
    assert median_ratio([1.0], [None]) is None


def test_presets_plan_what_the_tables_show() -> None:
    table6 = cases("table6", 32, [224], VARIANTS)
    assert {(c.network, c.variant) for c in table6} == {(f"resnet{d}", v) for d in (18, 34, 50) for v in VARIANTS}
    table8 = cases("table8", 256, [32, 64, 128], VARIANTS)
    expected = {(v, r, s) for v in KERNEL_VARIANTS for r in (32, 64, 128) for s in (1, 2, 3)}
    assert {(c.variant, c.resolution, c.stride) for c in table8} == expected
    targets = {c.setting for c in cases("targets", None, (), VARIANTS)}
    assert {"resnet18, 32x32, batch 32", "resnet50, 224x224, batch 8"} < targets
    table3 = cases("table3", 8, [512], VARIANTS)
    assert {(c.network, c.variant) for c in table3} == {
        (f"fcn_resnet{d}", v) for d in (18, 34, 50) for v in VARIANTS if v != "batch-primitives"
    }
    assert {(c.shape, c.evaluation_shape) for c in table3} == {((8, 3, 512, 1024), (1, 3, 1024, 2048))}
    assert {c.variant for c in cases("laptop", 4, [32], ["kernel", "floor"])} == {"kernel", "floor"}


def test_out_of_memory_is_reported_in_its_row_and_the_rest_goes_on() -> None:
    sizes = {"floor": 1, "kernel": 10**14, "algorithm1": 1}  # images in a batch
    floor, kernel, published = run_setting([Case("layers", v, 16, n, 3) for v, n in sizes.items()], 1, "cpu", True)
    assert kernel["status"] == "out of memory"
    assert kernel["step_ms"] is kernel["kept"] is kernel["kept_over_floor"] is None
    for row in (floor, published):
        assert row["status"] == "ok"
        assert min(row["step_ms"], row["evaluation_ms"], row["kept"], row["flops"]) > 0
    assert published["kept_over_floor"] > 2


def test_memory_of_segmentation_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--resolutions=[32]", "--batch_size=2", "--device=cpu", "--variants=[kernel,batch]"]
    main(["--preset=table3", *settings, f"--out={tmp_path}"])
    printed = capsys.readouterr().out
    for row in json.loads((tmp_path / "table3.json").read_text())["rows"]:
        kept, maps = row["kept_over_batch"], row["evaluation_maps"]
        assert f"{row['variant']}: keeps {kept:.2f} times what batch keeps for backward; evaluation of a" in printed
        assert f"peaks at {maps:.1f} of its largest feature maps" in printed
        assert kept < 1.35
    row = dict.fromkeys(row) | {"variant": "batch", "status": "out of memory"}
    assert module.memory_of(row) == "batch: out of memory"


def test_a_run_prints_a_table_and_writes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    stored["rows"][1] |= dict.fromkeys(stored["rows"][1].keys() - {"setting", "variant"}) | {"status": "out of memory"}
    module.write(stored["rows"], {"preset": "laptop"}, tmp_path / "bars")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "--batch_size must be at least 1, got 0"),
        ({"rounds": -1}, "--rounds must be at least 0, got -1"),
        ({"resolutions": [8]}, r"--resolutions must be a list of numbers of at least 16.*got \[8\]"),
        ({"resolutions": [32], "preset": "targets"}, "cannot be chosen for the preset targets"),
        ({"variants": []}, "--variants must name some of floor, kernel"),
        ({"variants": ["batch"], "preset": "table8"}, "the preset table8 has only floor, kernel, algorithm1"),
        (
            {"variants": ["batch-primitives"], "preset": "table3"},
            "the preset table3 has only floor, kernel, algorithm1, batch, group, layer",
        ),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark(**arguments)


def test_a_missing_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        main(["--device=cuda"])
    assert "knl benchmark: error: --device cuda: torch finds no GPU here" in capsys.readouterr().err
