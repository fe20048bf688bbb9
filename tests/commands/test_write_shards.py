from commands.runs import refused

from knlightning.commands.main import main
from knlightning.data import StreamingDataModule


def test_the_images_of_a_datamodule_are_written_and_read_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["write-shards", "--data", "DigitsDataModule", "--data.val_split", "0.1", "--out", "shards"]
    main([*command, "--images_per_shard", "500"])
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("shards: ")] == [
        "shards: 1293 images of train in 3 files",
        "shards: 144 images of validation in 1 files",
        "shards: 360 images of test in 1 files",
    ]
    data = StreamingDataModule("shards", test_name="test", eval_resize=32, eval_size=32, cache_dir="cache")
    data.setup("fit")
    data.setup("test")
    assert data.class_names == tuple("0123456789")
    assert len(data.test_dataloader().dataset) == 360
    message = refused(capsys, *command, "--images_per_shard", "400")
    assert "files of other data lie there: train-00000-of-00003.parquet" in message


def test_images_that_are_no_test_images_are_written_once(tmp_path):
    main(["write-shards", "--data=DigitsDataModule", f"--out={tmp_path}", "--images_per_shard=2000"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "train-00000-of-00001.parquet",
        "validation-00000-of-00001.parquet",
    ]


def test_wrong_arguments_are_named(tmp_path, capsys):
    command = ["write-shards", "--data=DigitsDataModule", f"--out={tmp_path}"]
    assert "--images_per_shard must be a whole number at least 1" in refused(capsys, *command, "--images_per_shard=0")
    message = refused(capsys, "write-shards", "--data=DigitScenesDataModule", f"--out={tmp_path}")
    assert "Those with a class for each pixel are not" in message
    assert "--data" in refused(capsys, "write-shards", "--data=DigitDataModule", f"--out={tmp_path}")
