import csv
from pathlib import Path

import pytest
from commands.runs import refused
from PIL import Image
from standins import write_image_folder

from knlightning.commands.main import main


def test_predict_writes_a_table_without_damaged_images(folder, capsys):
    images = folder / "images"
    images.mkdir()
    for name in ("b.png", "a.png"):
        Image.new("RGB", (9, 12), "white").save(images / name)
    Image.effect_noise((64, 64), 50).save(images / "cut.jpg")
    (images / "cut.jpg").write_bytes((images / "cut.jpg").read_bytes()[:900])
    (images / "text.jpg").write_text("no image")
    with pytest.warns(UserWarning, match=r"2 of the 4 images .* no prediction: .*cut\.jpg: .*truncated.*text\.jpg: "):
        main(["predict", "--config", "tiny.yaml", "--ckpt_path", "best", "--data.predict_dir", "images"])
    path = folder / "runs" / "tiny" / "0" / "predictions.csv"
    assert f"Predictions of 2 images: {path.relative_to(folder)}" in capsys.readouterr().out
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [Path(row["file"]).name for row in table] == ["a.png", "b.png"]
    assert 0 < float(table[0]["probability"]) <= 1
    assert table[0]["class"] in map(str, range(10))


@pytest.mark.parametrize(("name", "kwargs"), [("a.gif", {"save_all": True}), ("a.TIFF", {})])
def test_predict_takes_a_single_image_and_a_place_for_the_table(folder, capsys, name, kwargs):
    """Of an animation the first image counts."""
    frames = [Image.new("RGB", (9, 12), colour) for colour in ("white", "black")]
    frames[0].save(name, **kwargs, **({"append_images": frames[1:]} if kwargs else {}))
    frames[0].save("a.png")
    for out, path in (("one", name), ("other", "a.png")):
        main(["predict", "--config", "tiny.yaml", "--ckpt_path=best", f"--data.predict_dir={path}", f"--out={out}"])
    rows = [(folder / out / "predictions.csv").read_text().partition("\n")[2] for out in ("one", "other")]
    assert rows[0].startswith(f"{name},")
    assert rows[0].removeprefix(name) == rows[1].removeprefix("a.png")
    assert f"<small>{name}</small>" in (folder / "one" / "predictions.html").read_text()
    assert not (folder / "runs" / "tiny" / "0" / "predictions.csv").exists()


def test_grad_cam_darkens_the_page_and_leaves_the_table(folder):
    write_image_folder(folder / "images", count=2)
    network = "--model.backbone=knlightning.models.knresnet8"  # the tiny one has no maps of features
    args = ["predict", "--config", "tiny.yaml", network, "--seed_everything=1", "--data.predict_dir=images/val"]
    main([*args, "--out=plain"])
    main([*args, "--out=dark", "--predictions.grad_cam=true"])
    for name, same in (("predictions.csv", True), ("predictions.html", False)):
        assert ((folder / "plain" / name).read_bytes() == (folder / "dark" / name).read_bytes()) is same


def test_predictions_are_not_replaced_without_a_word(folder, capsys):
    Image.new("RGB", (9, 12), "white").save("a.png")
    args = ["predict", "--config", "tiny.yaml", "--ckpt_path", "best", "--data.predict_dir", "a.png"]
    main(args)
    main([*args, "--out", "there"])
    assert "Replaces" not in capsys.readouterr().out
    main(args)
    printed = capsys.readouterr().out
    assert "Replaces runs/tiny/0/predictions.csv of 20" in printed
    assert "Differs" not in printed  # what is predicted was no part of the training
    with pytest.raises(SystemExit):
        main([*args[:-1], "gone"])
    assert "Replaces" not in capsys.readouterr().out
    assert "--out there holds predictions.csv already" in refused(capsys, *args, "--out", "there")


def test_another_runs_folder_is_left_alone(folder, capsys):
    (folder / "images").mkdir()
    Image.new("RGB", (9, 12), "white").save(folder / "images" / "a.png")
    args = ["--ckpt_path", "runs/tiny/0/checkpoints/best.ckpt", "--data.predict_dir", "images"]
    main(["predict", "--config", "tiny.yaml", *args])
    assert "Predictions of 1 image: runs/tiny/1/predictions.csv" in capsys.readouterr().out
    assert not (folder / "runs" / "tiny" / "0" / "predictions.csv").exists()
    main(["predict", "--config", "runs/tiny/0/config.yaml", *args])
    assert "runs/tiny/0/predictions.csv" in capsys.readouterr().out
