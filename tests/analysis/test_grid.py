from pathlib import Path

import pytest

from knlightning.analysis.grid import format_table, list_cells
from knlightning.analysis.search import Search, Trial

COMMON = {"config": "a.yaml", "model.init_args.optimizer.init_args.lr": [0.1, 0.4], "data.scaling": "standard"}
COLUMNS = {"B=2": {"data.batch_size": 2, "trainer.max_epochs": 4}, "B=32": {"data.batch_size": 32}}
ROWS = {"group": {"model.backbone.norm": "group"}, "kernel": {"data.scaling": "unit", "model.optimizer.lr": 0.8}}


def test_a_cell_has_the_settings_of_its_row_and_column():
    cells = list_cells(ROWS, COLUMNS, COMMON)
    common = {"config": "a.yaml", "model.optimizer.lr": 0.1, "data.scaling": "standard"}
    assert list(cells) == [("group", "B=2"), ("group", "B=32"), ("kernel", "B=2"), ("kernel", "B=32")]
    assert cells["group", "B=2"] == common | COLUMNS["B=2"] | ROWS["group"]
    assert cells["group", "B=32"] == common | COLUMNS["B=32"] | ROWS["group"] | {"model.optimizer.lr": 0.4}
    assert cells["kernel", "B=32"] == common | COLUMNS["B=32"] | ROWS["kernel"]


@pytest.mark.parametrize(
    ("only", "chosen"),
    [
        (["kernel"], [("kernel", "B=2"), ("kernel", "B=32")]),
        (["B=2"], [("group", "B=2"), ("kernel", "B=2")]),
        (["B=2", "group"], [("group", "B=2")]),
    ],
)
def test_a_table_may_be_limited(only, chosen):
    assert list(list_cells(ROWS, COLUMNS, COMMON, only)) == chosen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": COMMON | {"data.root": ["a"]}}, "settings.data.root must be a list of 2 values, one for each"),
        ({"rows": {"a": {"data.root": ["a"]}}}, "rows.a.data.root must be a list of 2 values"),
        ({"settings": {"config": "a.yaml"}, "rows": {"a": {}}}, "must be with model.optimizer.lr, got .*a, B=2"),
        ({"settings": {"model.optimizer.lr": 0.1}}, "settings must be with config"),
        ({"only": ["B=3"]}, "only must be one of group, kernel, B=2, B=32, got 'B=3'"),
    ],
)
def test_wrong_grids(changes, message):
    with pytest.raises(ValueError, match=message):
        list_cells(**({"rows": ROWS, "columns": COLUMNS, "settings": COMMON} | changes))


def found(learning_rate, *test):
    trials = [Trial(learning_rate, seed, 0.5, value, False, Path()) for seed, value in enumerate(test)]
    return Search(trials, learning_rate, [])


def test_a_row_of_accuracies_and_learning_rates():
    searches = {
        ("resnet8, batch", "B=2"): found(0.1, 0.5, 0.7),
        ("resnet8, batch", "B=32"): found(0.2, 0.25, 0.25),
        ("knresnet8, kernel", "B=2"): found(0.05, 1.0, 0.98),
    }
    assert format_table(searches, learning_rates=True).splitlines() == [
        "| | B=2 | learning rate | B=32 | learning rate |",
        "| --- | --- | --- | --- | --- |",
        "| resnet8, batch | 60.00 ± 14.14 | 0.1 | 25.00 ± 0.00 | 0.2 |",
        "| knresnet8, kernel | 99.00 ± 1.41 | 0.05 | | |",
    ]
    assert format_table(searches, learning_rates=False).splitlines()[1:] == [
        "| --- | --- | --- |",
        "| resnet8, batch | 60.00 ± 14.14 | 25.00 ± 0.00 |",
        "| knresnet8, kernel | 99.00 ± 1.41 | |",
    ]
