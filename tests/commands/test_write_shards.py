import pytest
from commands.runs import refused
from standins import write_image_folder

from knlightning.commands.main import main
from knlightning.data import StreamingDataModule


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Twenty training images and as many for validation, in two classes."""
    monkeypatch.chdir(tmp_path)
    write_image_folder(tmp_path / "data", count=10)
    return ["write-shards", "--data", "ImageFolderDataModule", "--data.root", "data", "--out", "shards"]


def test_the_images_of_a_datamodule_are_written_and_read_again(command, capsys):
    main([*command, "--data.val_split", "0.2", "--images_per_shard", "6"])
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("shards: ")] == [
        "shards: 16 images of train in 3 files",
        "shards: 4 images of validation in 1 file",
        "shards: 20 images of test in 4 files",
    ]
    data = StreamingDataModule("shards", test_name="test", cache_dir="cache")
    data.setup("fit")
    data.setup("test")
    assert data.class_names == ("cat", "dog")
    assert data.test_dataloader().dataset.labels.tolist() == [0] * 10 + [1] * 10
    message = refused(capsys, *command, "--data.val_split=0.2", "--images_per_shard=7")
    assert "files of other data lie there" in message


def test_validation_images_that_serve_for_testing_too_are_written_once(command, tmp_path):
    main(command)
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == [
        "train-00000-of-00001.parquet",
        "validation-00000-of-00001.parquet",
    ]


def test_wrong_arguments_are_named(command, capsys):
    assert "--images_per_shard must be a whole number at least 1" in refused(capsys, *command, "--images_per_shard=0")
    assert "Did you mean" in refused(capsys, *command, "--data", "ImageFolderDataModul")
