import pytest

from knlightning.commands.models import main
from knlightning.models import list_models
from knlightning.nn.normalization import NORMS


def test_both_tables_are_printed(capsys):
    main([])
    printed = capsys.readouterr().out
    first, second = (
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
        for table in printed.split("\n\n")
    )
    assert [row[0] for row in first] == ["network", "-" * 15, *(model.name for model in list_models())]
    assert [row[0] for row in second] == ["normalization", "-" * 13, *NORMS]
    assert {len(row) for row in first} == {8}
    assert {len(row) for row in second} == {4}
    rows = {row[0]: row[1:] for row in first}
    weights = "ImageNet, by the authors of the paper; see load_norm_torch_weights"
    expected = ["11,685,220", "kernel", "all but group", "large, small", "classification", weights, "1, 2, 4, cifar10"]
    assert rows["knresnet18"] == expected
    assert rows["resnet8"][1:4] == ["batch", "all", "small, large"]
    assert rows["convnext_tiny"][:4] == ["28,589,128", "", "", "large"]


def test_arguments_are_refused(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--norm", "batch"])
    assert end.value.code == 2
    assert "norm" in capsys.readouterr().err
