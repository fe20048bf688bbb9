from knlightning.analysis import benchmark as module
from knlightning.analysis.benchmark import KERNEL_VARIANTS, VARIANTS, list_cases, median_ratio, run_setting
from knlightning.analysis.measure import start
from knlightning.analysis.variants import Case

PRECISIONS = [("float32", False), ("bfloat16", False), ("bfloat16", True)]
TIMES = {  # milliseconds of three rounds
    ("floor", "step"): [100.0, 200.0, 400.0],
    ("kernel", "step"): [110.0, 260.0, 400.0],
    ("floor", "evaluation"): [10.0, 10.0, 10.0],
    ("kernel", "evaluation"): [20.0, 30.0, None],
}


def test_ratios_are_taken_within_a_round_of_all_variants(monkeypatch):
    asked = []

    class FakeWorker:
        status = "ok"

        def ask(self, function, *args):
            if function is start:
                self.variant = args[0].variant
                return {"kept": 30 if self.variant == "kernel" else 20, "flops": 8}
            asked.append((self.variant, args[0]))
            return TIMES[asked[-1]][asked.count(asked[-1]) - 1]

        def close(self):
            pass

    monkeypatch.setattr(module, "Worker", FakeWorker)
    floor, kernel = run_setting([Case("layers", v, 32, 1) for v in ("floor", "kernel")], 3, "cpu", True)
    assert asked[:4] == [("floor", "step"), ("kernel", "step"), ("floor", "evaluation"), ("kernel", "evaluation")]
    assert (floor["step_ms"], kernel["step_ms"]) == (200.0, 260.0)
    assert kernel["step_ms_over_floor"] == 1.1  # of 1.1, 1.3 and 1: not 260 / 200
    assert kernel["images_per_second"] == 1e3 / 260
    assert kernel["evaluation_ms"] is kernel["evaluation_ms_over_floor"] is None
    assert (kernel["kept_over_floor"], kernel["step_ms_over_batch"], kernel["flops_over_floor"]) == (1.5, None, 1.0)


def test_no_ratio_without_a_floor():
    assert median_ratio([1.0], []) is None
    assert median_ratio([], []) is None
    assert median_ratio([1.0], [None]) is None
    assert median_ratio([1.0], [0]) is None


def test_presets_plan_what_the_tables_show():
    table6 = list_cases("table6", 32, [224], VARIANTS)
    assert {(c.network, c.variant) for c in table6} == {(f"resnet{d}", v) for d in (18, 34, 50) for v in VARIANTS}
    table8 = list_cases("table8", 256, [32, 64, 128], VARIANTS)
    expected = {(v, r, s) for v in KERNEL_VARIANTS for r in (32, 64, 128) for s in (1, 2, 3)}
    assert {(c.variant, c.resolution, c.stride) for c in table8} == expected
    targets = {c.setting for c in list_cases("targets", None, (), VARIANTS)}
    assert {"resnet18, 32x32, batch 32", "resnet50, 224x224, batch 8"} < targets
    converted = list_cases("converted", None, [128], VARIANTS)
    assert {(c.batch_size, c.variant) for c in converted} == {
        (n, v) for n in (2, 16) for v in ("floor", "kernel", "batch", "group")
    }
    assert len(converted) == 4 * 8
    table3 = list_cases("table3", 8, [512], VARIANTS)
    assert {(c.network, c.variant) for c in table3} == {
        (f"fcn_resnet{d}", v) for d in (18, 34, 50) for v in VARIANTS if v != "batch-primitives"
    }
    assert {(c.shape, c.evaluation_shape) for c in table3} == {((8, 3, 512, 1024), (1, 3, 1024, 2048))}
    gpu = list_cases("gpu", 32, (), VARIANTS)
    networks = {(c.network, c.precision, c.compiled) for c in gpu if c.resolution == 224}
    assert networks == {(f"resnet{d}", *how) for d in (18, 50) for how in PRECISIONS}
    assert {c.variant for c in gpu if c.resolution == 224} == {"floor", "kernel", "batch", "group"}
    assert [c.compiled for c in gpu] == sorted(c.compiled for c in gpu)
    assert {c.variant for c in list_cases("laptop", 4, [32], ["kernel", "floor"])} == {"kernel", "floor"}


def test_out_of_memory_is_reported_in_its_row_and_the_rest_goes_on():
    sizes = {"floor": 1, "kernel": 10**14, "algorithm1": 1}  # images in a batch
    floor, kernel, published = run_setting([Case("layers", v, 16, n, 3) for v, n in sizes.items()], 1, "cpu", True)
    assert kernel["status"] == "out of memory"
    assert kernel["step_ms"] is kernel["kept"] is kernel["kept_over_floor"] is None
    for row in (floor, published):
        assert row["status"] == "ok"
        assert min(row["step_ms"], row["evaluation_ms"], row["kept"], row["flops"]) > 0
    assert published["kept_over_floor"] > 2
