import json
import statistics

import pytest
from standins import PROJECT, write_cifar100, write_cityscapes

from knlightning.analysis.paper import ROWS
from knlightning.commands.main import main
from knlightning.commands.reproduce import choose, page, reproduce

FEW = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--data.eval_batch_size=7"]
FEW += ["--trainer.limit_train_batches=1", "--trainer.enable_progress_bar=false"]


def test_without_a_choice_all_rows_are_listed(capsys):
    main(["reproduce"])
    assert capsys.readouterr().out == page()
    assert page().count("`knl reproduce --") >= len(ROWS)


def test_the_page_is_current():
    assert (PROJECT / "docs" / "reproduce.md").read_text() == page(), "run: knl reproduce > docs/reproduce.md"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_command_of_a_row_chooses_this_row_alone(row):
    options = row.command.removeprefix("knl reproduce --").split(" --")
    choice = dict(option.split() for option in options)
    if "batch_size" in choice:
        choice["batch_size"] = int(choice["batch_size"])
    assert choose(**choice) == [row]


def test_a_choice_that_fits_no_row_names_those_there_are(capsys):
    with pytest.raises(ValueError, match=r"norm must be one of layer, group, batch, got 'instance'"):
        choose(backbone="resnet18", norm="instance")
    with pytest.raises(SystemExit) as stop:
        main(["reproduce", "--table", "2", "--batch_size", "2"])
    assert stop.value.code == 2
    assert "--batch_size must be one of 256, got 2. The paper has no such row" in capsys.readouterr().err


def test_wrong_arguments(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"seeds must be a whole number at least 1, or null for 3, .*, got 0"):
        reproduce(table="1", seeds=0)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no configs/cifar10_resnet18.yaml in .*: start in"):
        reproduce(table="cifar10")


def test_mean_and_deviation_beside_what_was_published(tmp_path, monkeypatch, capsys):
    """With the accuracies of runs that are done."""
    monkeypatch.chdir(PROJECT)
    for row in choose("cifar10", norm="layer") + choose("cifar10", norm="kernel"):
        for seed, accuracy in enumerate((0.9, 0.92, 0.97)):
            directory = tmp_path / row.name / f"seed{seed}"
            directory.mkdir(parents=True)
            settings = {"config": str(row.path), **{key: str(value) for key, value in row.settings.items()}}
            content = {"settings": settings | {"seed_everything": str(seed)}, "accuracies": {"test": accuracy}}
            (directory / "result.json").write_text(json.dumps(content))
    reproduce("cifar10", norm="layer", out=tmp_path)
    assert "| resnet18, layer, 128 | 90.32 | 93.00 ± 3.61 |\n" in capsys.readouterr().out
    main(["reproduce", "--table", "cifar10", "--norm", "kernel", "--seeds", "1", "--out", str(tmp_path)])
    assert "| knresnet18, kernel, 128 | 93.27 | 90.00 |\n" in capsys.readouterr().out


@pytest.mark.slow
def test_three_scores_of_segmentation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    write_cityscapes(tmp_path / "cityscapes", size=(32, 16))
    choice = ["--table", "3", "--backbone", "fcn_resnet18", "--norm", "group", "--seeds", "2"]
    small = ["--data.root=cityscapes", "--data.crop_size=[16, 32]", "--data.batch_size=2", "--data.num_workers=0"]
    main(["reproduce", *choice, *small, *(option for option in FEW if "eval_batch_size" not in option)])
    means = []
    for name in ("test", "pixel_acc", "mean_acc"):
        runs = (tmp_path / "runs" / "reproduce").glob("3-fcn_resnet18-group-batch16/seed*/result.json")
        values = [json.loads(run.read_text())["accuracies"][name] for run in runs]
        means.append(f"{100 * statistics.mean(values):.2f} ± {100 * statistics.stdev(values):.2f}")
    published = "62.33 ± 0.52 / 93.23 ± 0.01 / 71.58 ± 0.55"
    assert f"| fcn_resnet18, group, 16 | {published} | {' / '.join(means)} |\n" in capsys.readouterr().out


@pytest.mark.slow
def test_trains_a_row_with_its_settings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    write_cifar100(tmp_path / "data")
    (row,) = choose("1", "knresnet18", batch_size=2)
    main(["reproduce", "--table", "1", "--backbone", "knresnet18", "--batch_size", "2", "--seeds", "2", *FEW])
    runs = tmp_path / "runs" / "reproduce" / row.name
    accuracies = [json.loads((runs / f"seed{seed}/result.json").read_text())["accuracies"]["test"] for seed in range(2)]
    assert f"| 79.10 ± 0.10 | {50 * sum(accuracies):.2f} ± " in capsys.readouterr().out
    for seed in range(2):
        text = (runs / f"seed{seed}" / "config.yaml").read_text()
        assert f"seed_everything: {seed}\n" in text
        assert "norm: kernel\n" in text
        assert "lr: 0.0015625\n" in text
        assert " batch_size: 2\n" in text
        assert "max_epochs: 1\n" in text
