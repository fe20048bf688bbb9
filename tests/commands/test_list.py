import pytest

from knlightning.commands.list import KINDS, main
from knlightning.models import list_models
from knlightning.nn.normalization import NORMS


def tables(capsys, *args):
    main(list(args))
    return [
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
        for table in capsys.readouterr().out.split("\n\n")
    ]


def test_all_kinds_are_listed(capsys):
    first, second, *others = tables(capsys)
    assert [row[0] for row in first] == ["models", "-" * 15, *(model.name for model in list_models())]
    assert [row[0] for row in second] == ["norms", "-" * 13, *NORMS]
    assert {len(row) for row in first} == {8}
    assert {len(row) for row in second} == {4}
    rows = {row[0]: row[1:] for row in first}
    weights = "imagenet1k_norm_torch: ImageNet, by the authors of the paper"
    expected = ["11,685,220", "kernel", "all but group", "large, small", "classification", weights, "1, 2, 4, cifar10"]
    assert rows["knresnet18"] == expected
    assert rows["resnet8"][1:4] == ["batch", "all", "small, large"]
    assert rows["convnext_tiny"][:4] == ["28,589,128", "", "", "large"]
    assert [table[0][0] for table in others] == list(KINDS)[2:]


def test_another_kind_is_told_what_there_is(capsys):
    with pytest.raises(SystemExit):
        main(["dta"])
    assert "kind must be one of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "there", "missing"),
    [
        ("data", {"CIFAR10DataModule", "ImageFolderDataModule"}, {"BaseDataModule", "Sampling"}),
        ("tasks", {"ClassificationTask", "SegmentationTask"}, {"Task", "CosineLR"}),
        ("callbacks", {"EMA", "DifferentialPrivacy", "Throughput"}, {"AtomicCheckpointIO"}),
        ("configs", {"configs/quickstart.yaml", "configs/imagenet_knresnet50.yaml"}, set()),
    ],
)
def test_one_kind(capsys, kind, there, missing):
    (table,) = tables(capsys, kind)
    assert all(all(row) for row in table)
    names = {row[0] for row in table[2:]}
    assert there <= names
    assert not missing & names


def test_arguments_are_refused(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--norm", "batch"])
    assert end.value.code == 2
    assert "norm" in capsys.readouterr().err
