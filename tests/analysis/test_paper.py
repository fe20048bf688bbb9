"""Tables 1 and 5; tests/integration/test_configs.py compares all of them with what the configurations say."""

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


def test_tables_1_and_5():
    printed = []
    for line in TABLES_1_AND_5.split("\n")[1:-1]:
        backbone, norm, *numbers = line.split()
        for i, size in enumerate((2, 32, 256)):
            printed.append((backbone, norm, size, numbers[i].replace("±", " ± "), float(numbers[3 + i])))
    rows = [row for row in ROWS if row.table == "1"]
    assert [(row.backbone, row.norm, row.batch_size, row.published) for row in rows] == [line[:4] for line in printed]
    # the paper rounds two of the learning rates in their sixth digit
    assert [row.learning_rate for row in rows] == pytest.approx([line[4] for line in printed], rel=3e-6)
    assert len(rows) == 63
    for row in rows:
        assert row.settings == {NORM: row.norm, BATCH_SIZE: row.batch_size, LEARNING_RATE: row.learning_rate}
        assert (START / row.learning_rate).is_integer()


def test_every_row_is_told_from_the_others():
    assert len({row.name for row in ROWS}) == len({row.command for row in ROWS}) == len(ROWS)


def test_every_backbone_exists():
    for row in ROWS:
        assert callable(getattr(models, row.backbone))
