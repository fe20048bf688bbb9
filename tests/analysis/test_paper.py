import pytest

from knlightning import models
from knlightning.analysis.paper import BATCH_SIZE, LEARNING_RATE, NORM, ROWS, START

# model, norm; accuracies for batch sizes 2, 32 and 256; learning rates likewise, as they are printed
TABLES_1_AND_5 = """
resnet18 layer 72.68±0.22 73.17±0.16 71.99±0.45 0.0015625 0.0125 0.05
preact_resnet18 layer 73.51±0.10 73.36±0.15 72.91±0.07 0.0015625 0.0125 0.05
resnet18 group 74.62±0.12 74.46±0.05 74.46±0.08 0.0015625 0.025 0.1
preact_resnet18 group 74.82±0.24 74.74±0.44 74.62±0.36 0.0015625 0.025 0.1
resnet18 batch 72.11±0.25 78.52±0.20 77.72±0.04 0.00078125 0.025 0.2
preact_resnet18 batch 72.57±0.19 78.32±0.09 77.83±0.16 0.00078125 0.025 0.2
knresnet18 kernel 79.10±0.10 79.29±0.02 78.84±0.10 0.0015625 0.05 0.2
resnet34 layer 73.74±0.26 73.88±0.37 72.48±0.57 0.0015625 0.0125 0.05
preact_resnet34 layer 74.79±0.13 74.34±0.42 73.10±0.42 0.0015625 0.0125 0.05
resnet34 group 75.76±0.14 75.72±0.06 75.44±0.27 0.0015625 0.025 0.1
preact_resnet34 group 75.82±0.05 75.85±0.28 75.76±0.25 0.0015625 0.025 0.1
resnet34 batch 73.06±0.23 79.21±0.09 78.27±0.19 0.00078125 0.025 0.1
preact_resnet34 batch 72.20±0.19 79.09±0.03 78.59±0.24 0.000390625 0.025 0.2
knresnet34 kernel 79.28±0.09 79.53±0.15 79.16±0.21 0.0015625 0.05 0.2
resnet50 layer 75.83±0.25 75.74±0.14 74.37±0.58 0.00078125 0.0125 0.05
preact_resnet50 layer 74.28±0.31 74.57±0.32 73.41±0.15 0.0015625 0.0125 0.05
resnet50 group 77.03±0.62 77.02±0.08 74.79±0.14 0.00078125 0.0125 0.05
preact_resnet50 group 75.67±0.27 76.08±0.18 75.52±0.13 0.0015625 0.025 0.1
resnet50 batch 71.02±0.15 80.39±0.06 77.89±0.06 0.000390626 0.0125 0.1
preact_resnet50 batch 70.83±0.41 80.28±0.15 78.88±0.21 0.000195313 0.0125 0.2
knresnet50 kernel 80.24±0.18 80.18±0.10 80.09±0.26 0.0015625 0.025 0.2
"""
# layer, group, batch, kernel
TABLE_2 = {18: [68.34, 68.93, 70.28, 71.17], 34: [71.64, 72.63, 73.99, 74.60], 50: [73.80, 75.92, 76.41, 76.54]}
# mean IoU / pixel accuracy / mean accuracy for ResNets of 18, 34 and 50 layers
TABLE_3 = """
layer 59.10±0.46 92.42±0.17 69.43±0.58 60.19±0.32 92.73±0.17 70.12±0.33 57.88±0.84 92.31±0.21 68.25±0.75
group 62.33±0.52 93.23±0.01 71.58±0.55 64.21±0.58 93.59±0.07 74.32±0.49 62.14±0.68 93.34±0.04 71.66±0.64
local_context 62.25±0.67 92.99±0.06 71.59±0.68 64.75±0.38 93.31±0.09 74.25±0.37 64.03±0.02 93.07±0.14 73.40±0.03
batch 63.90±0.06 93.77±0.02 73.15±0.14 66.94±0.34 94.27±0.03 76.50±0.41 65.19±0.50 93.98±0.03 74.65±0.62
kernel 64.37±0.14 93.73±0.01 73.46±0.12 67.61±0.17 94.13±0.05 76.58±0.19 68.02±0.13 94.22±0.04 77.03±0.05
"""


def rows_of(table):
    return [row for row in ROWS if row.table == table]


def test_tables_1_and_5():
    printed = []
    for line in TABLES_1_AND_5.split("\n")[1:-1]:
        backbone, norm, *numbers = line.split()
        for i, size in enumerate((2, 32, 256)):
            printed.append((backbone, norm, size, numbers[i].replace("±", " ± "), float(numbers[3 + i])))
    rows = rows_of("1")
    assert [(row.backbone, row.norm, row.batch_size, row.published) for row in rows] == [line[:4] for line in printed]
    # the paper rounds two of the learning rates in their sixth digit
    assert [row.learning_rate for row in rows] == pytest.approx([line[4] for line in printed], rel=3e-6)
    assert len(rows) == 63
    for row in rows:
        assert row.settings == {NORM: row.norm, BATCH_SIZE: row.batch_size, LEARNING_RATE: row.learning_rate}
        assert (START / row.learning_rate).is_integer()


def test_table_2():
    assert [(row.backbone, row.norm, row.accuracy) for row in rows_of("2")] == [
        (f"{'knresnet' if norm == 'kernel' else 'resnet'}{depth}", norm, accuracy)
        for depth, accuracies in TABLE_2.items()
        for norm, accuracy in zip(("layer", "group", "batch", "kernel"), accuracies, strict=True)
    ]


def test_table_3():
    printed = set()
    for line in TABLE_3.split("\n")[1:-1]:
        norm, *numbers = line.split()
        for i, depth in enumerate((18, 34, 50)):
            backbone = f"fcn_{'knresnet' if norm == 'kernel' else 'resnet'}{depth}"
            printed.add((backbone, norm, " / ".join(numbers[3 * i : 3 * i + 3]).replace("±", " ± ")))
    rows = rows_of("3")
    assert {(row.backbone, row.norm, row.published) for row in rows} == printed
    assert len(rows) == len(printed) == 15
    assert {(row.learning_rate, row.batch_size) for row in rows} == {(0.01, 16)}
    assert all(row.settings == {NORM: row.norm} for row in rows)


def test_table_4():
    assert [(row.backbone, row.norm, row.batch_size, row.learning_rate, row.accuracy) for row in rows_of("4")] == [
        ("resnet18", "layer", 8192, 4.0, 20.81),
        ("resnet18", "group", 8192, 4.0, 20.99),
        ("knresnet18", "kernel", 8192, 4.0, 22.01),
    ]


def test_what_is_told_in_the_text():
    assert [(row.backbone, row.accuracy) for row in rows_of("convnext")] == [
        ("convnext_tiny", 80.87),
        ("knconvnext_tiny", 81.25),
    ]
    assert [(row.backbone, row.norm, row.learning_rate, row.accuracy) for row in rows_of("cifar10")] == [
        ("resnet18", "layer", 0.05, 90.32),
        ("resnet18", "group", 0.05, 90.58),
        ("resnet18", "batch", 0.1, 92.11),
        ("knresnet18", "kernel", 0.1, 93.27),
    ]
    assert [(row.backbone, row.norm, row.accuracy) for row in rows_of("ablation")] == [
        ("knresnet50", "none", 71.48),
        ("knresnet50", "kernel", 78.32),
    ]


def test_every_row_is_told_from_the_others():
    assert len({row.name for row in ROWS}) == len({row.command for row in ROWS}) == len(ROWS)


def test_every_backbone_exists():
    for row in ROWS:
        assert callable(getattr(models, row.backbone))
