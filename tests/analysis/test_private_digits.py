import csv

import pytest
from standins import PROJECT

from knlightning.analysis.private_digits import draw, main, table

FOUND = {
    ("resnet8", "kernel", 8.0): [90.0, 92.0],
    ("resnet8", "none", 8.0): [80.0, 80.0],
    ("resnet8", "kernel", 1.0): [70.0],
}


def test_a_row_a_network_and_a_column_a_budget():
    assert table(FOUND).splitlines() == [
        "| network | normalization | ε = 8 | ε = 1 |",
        "| --- | --- | --- | --- |",
        "| resnet8 | kernel | 91.0 ± 1.4 | 70.0 |",
        "| resnet8 | none | 80.0 ± 0.0 |  |",
    ]


def test_a_line_a_network():
    (axes,) = draw(FOUND).axes
    lines = {
        handle.get_label(): [list(xy) for xy in handle.lines[0].get_xydata().tolist()] for handle in axes.containers
    }
    assert lines == {"resnet8, kernel": [[8.0, 91.0], [1.0, 70.0]], "resnet8, none": [[8.0, 80.0]]}


@pytest.mark.slow
def test_from_one_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    few = ["--seeds", "2", "--epochs", "1", "--epsilons", "[8, 2]", "--rates", "{knresnet8: {kernel: 0.5}}"]
    few += ["--trainer.limit_train_batches", "1", "--trainer.callbacks.accountant", "rdp"]
    main(few)
    printed = capsys.readouterr().out
    assert "| knresnet8 | kernel |" in printed
    with (tmp_path / "runs" / "private_digits" / "private_digits.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["epsilon"], row["seed"]) for row in rows] == [("8.0", "0"), ("8.0", "1"), ("2.0", "0"), ("2.0", "1")]
    main(few)  # nothing is done again
    assert "epsilon" not in capsys.readouterr().out.split("Test accuracy")[0]
