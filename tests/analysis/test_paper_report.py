import pytest

from knlightning.analysis.paper import MEMORY, ROWS, SCALING, TIMES, rows_of, tiny
from knlightning.analysis.paper_report import (
    NOT,
    REPRODUCED,
    SECTIONS,
    Finding,
    compare_convergence,
    compare_landscapes,
    compare_layer_costs,
    compare_learning_rates,
    compare_network_costs,
    compare_scores,
    write_html,
    write_markdown,
)

(KNRESNET18,) = (row for row in rows_of("1") if (row.backbone, row.batch_size) == ("knresnet18", 2))  # 79.10 ± 0.10
(IMAGENET,) = (row for row in rows_of("2") if row.backbone == "knresnet18")  # 71.17, a single run


@pytest.mark.parametrize(
    ("row", "values", "difference", "verdict"),
    [
        (KNRESNET18, (79.0, 79.1, 79.3), "+0.03 (+0.3 SD)", REPRODUCED),
        (KNRESNET18, (78.0, 78.1, 78.3), "-0.97 (-9.7 SD)", f"{NOT}: lower"),
        (KNRESNET18, (79.4,), "+0.30 (+3.0 SD)", REPRODUCED),  # p = 0.12: one run tells little
        (KNRESNET18, (77.0,), "-2.10 (-21.0 SD)", f"{NOT}: lower"),
        (IMAGENET, (71.0, 71.1, 71.3), "-0.04", REPRODUCED),
        (IMAGENET, (70.0, 70.1, 70.2), "-1.07", f"{NOT}: lower"),
        (IMAGENET, (71.0,), "-0.17", "not comparable: a single run each"),
    ],
)
def test_verdicts_of_scores(row, values, difference, verdict):
    found = compare_scores("1", row, [[value] for value in values], "knl", 60, "")
    assert (found.difference, found.verdict) == (difference, verdict)
    assert found.ours.endswith(f" ({len(values)})")


def test_one_of_three_scores_that_differs_is_enough():
    row = next(row for row in ROWS if row.further)
    (mean, _), *others = ((row.accuracy, row.sd), *row.further)
    same = [[mean + d, *(value + d for value, _ in others)] for d in (-0.1, 0.0, 0.1)]
    assert compare_scores("3", row, same, "knl", 0, "").verdict == REPRODUCED
    other = [[*run[:-1], run[-1] - 20] for run in same]
    assert compare_scores("3", row, other, "knl", 0, "").verdict == f"{NOT}: lower"
    assert compare_scores("3", row, same, "knl", 0, "another length").verdict == "not comparable: another length"


def test_learning_rates():
    row = KNRESNET18
    assert compare_learning_rates(row, 0.0015625, "knl", 0, "").verdict == REPRODUCED
    found = compare_learning_rates(row, 0.003125, "knl", 0, "")
    assert (found.published, found.ours, found.difference, found.verdict) == ("0.0015625", "0.003125", "2 times", NOT)


def write_runs(path, *accuracies):
    for name, values in enumerate(accuracies):
        (path / str(name)).mkdir(parents=True)
        lines = [f"{epoch},{value},{epoch}\n" for epoch, value in enumerate(values)]
        (path / str(name) / "metrics.csv").write_text("step,val/acc,epoch\n" + "".join(lines))
    return [path / str(name) for name in range(len(accuracies))]


@pytest.mark.parametrize(
    ("kernel", "verdict"),
    [
        (((0.5, 0.9), (0.52, 0.9)), REPRODUCED),
        (((0.3, 0.9), (0.7, 0.9)), f"{NOT}: ahead, but it may be chance"),
        (((0.1, 0.99), (0.12, 0.99)), NOT),
    ],
)
def test_the_faster_one_has_the_higher_mean_over_the_epochs(tmp_path, kernel, verdict):
    lines = {
        "b, batch": write_runs(tmp_path / "b", (0.4, 0.9), (0.42, 0.9)),
        "k, kernel": write_runs(tmp_path / "k", *kernel),
        "g, group": write_runs(tmp_path / "g", (0.1, 0.2), (0.1, 0.2)),
    }
    found = compare_convergence("B = 2", lines, "k, kernel", "knl", "")
    assert found.verdict == verdict
    assert found.ours.endswith("; g, group 15.00 ± 0.00 (2)")


def test_the_flatter_one_rises_less():
    results = {
        norm: {"loss": 0.1, "ball": [0.1 + rise, 0.1 + rise], "eigenvalues": [1.0, 2.0]}
        for norm, rise in {"layer": 0.4, "batch": 0.3, "kernel": 0.1, "group": 0.2}.items()
    }
    found = {finding.labels["norm"]: finding for finding in compare_landscapes(results, "knl", "")}
    assert list(found) == ["kernel", "group", "batch", "layer"]
    assert found["kernel"].ours == "1: 0.1; 2"
    assert [finding.verdict for finding in found.values()] == [REPRODUCED, NOT, NOT, REPRODUCED]


def test_costs_are_relative():
    costs = {"kernel": (4.0, 9.0, None), "algorithm1": (6.0, 12.0, 30.0), "batch-primitives": (2.0, 6.0, 10.0)}
    rows = [
        {"network": f"resnet{depth}", "variant": variant, "resolution": 224}
        | dict(zip(("step_ms", "evaluation_ms", "step_peak"), values, strict=True))
        for depth in TIMES
        for variant, values in costs.items()
    ]
    found = compare_network_costs(rows, "a machine", "knl")
    assert [finding.section for finding in found] == ["6", "7"] * 3
    assert [(f.published, f.ours) for f in found[4:]] == [
        ("1.66 / 1.90", "2.00 / 1.50; 3.00 / 2.00"),  # section 5 names the 1.66
        (f"{MEMORY[50]['kernel'] / MEMORY[50]['batch-primitives']:.2f}", "-; 3.00"),
    ]
    assert found[0].verdict == "not comparable: another machine, a machine"
    layers = [
        {
            "variant": "kernel",
            "stride": stride,
            "resolution": size,
            "evaluation_ms": size / stride,
            "evaluation_peak": 1,
        }
        for stride in SCALING
        for size in (32, 64)
    ]
    shown = {tuple(f.labels.values()): (f.published, f.ours) for f in compare_layer_costs(layers, "a machine", "knl")}
    assert shown["1", "64x64"] == ("3.45 / 1.76", "2.00 / 1.00")
    assert shown["2", "32x32"] == ("0.26 / 0.80", "0.50 / 1.00")


def test_reports_show_every_section_with_its_pictures(tmp_path):
    (tmp_path / "figure4.png").write_bytes(b"picture")
    findings = [
        Finding(section, {"network": f"<{section}>"}, "1", "2", "", f"{NOT}: why", f"knl reproduce {section}", 90)
        for section in SECTIONS
    ]
    findings.append(Finding("1", {"network": "x", "dropout": "0"}, "1", "2", "+1", REPRODUCED, "knl x"))
    markdown = write_markdown(findings, {"torch": "2"}, tmp_path)
    assert "| network | dropout | published | ours (runs) | difference | verdict | minutes | command |" in markdown
    assert "| <2> | 1 | 2 | not reproduced: why | 1.5 | `knl reproduce 2` |" in markdown
    assert "](figure4.png)" in markdown
    assert "surfaces.png" not in markdown  # not drawn yet
    html = write_html(findings, {"torch": "2"}, tmp_path)
    assert "&lt;figure 4&gt;" in html
    assert "cGljdHVyZQ==" in html
    for title in SECTIONS.values():
        assert f"## {title}\n" in markdown
        assert title.replace("'", "&#x27;") in html


def test_tiny_rows_are_few_and_small():
    for table in ("1", "2", "3", "4", "convnext", "cifar10", "ablation"):
        rows = rows_of(table, "tiny")
        assert rows
        assert len({row.name for row in rows}) == len(rows)
        assert {row.norm for row in rows} <= {row.norm for row in rows_of(table)}
        assert all(row.settings["trainer.max_epochs"] <= 3 for row in rows)
    assert tiny(next(row for row in ROWS if row.backbone == "resnet50")) is None
    assert [row.published for row in rows_of("ablation", "tiny")] == [row.published for row in rows_of("ablation")]
