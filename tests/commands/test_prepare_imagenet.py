from commands.runs import refused

from knlightning.commands import prepare_imagenet
from knlightning.commands.main import main


def test_what_is_there_is_unpacked_or_checked(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(prepare_imagenet, "unpack", lambda *args: calls.append(args[:3]))
    (tmp_path / "val").mkdir()
    (tmp_path / "ILSVRC2012_img_train.tar").touch()
    main(["prepare-imagenet", f"--archives={tmp_path}", f"--root={tmp_path}"])
    assert calls == [("train", tmp_path, tmp_path), ("val", tmp_path, tmp_path)]
    (tmp_path / "val").rmdir()
    main(["prepare-imagenet", f"--archives={tmp_path}", f"--root={tmp_path}"])
    assert [call[0] for call in calls[2:]] == ["train"]


def test_nothing_to_unpack_is_told(tmp_path, capsys):
    message = refused(capsys, "prepare-imagenet", f"--archives={tmp_path}", f"--root={tmp_path}")
    assert "There is no ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar in" in message
