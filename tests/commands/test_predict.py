import csv
from pathlib import Path

from PIL import Image

from knlightning.commands.main import main


def test_predict_writes_a_table(folder, capsys):
    images = folder / "images"
    images.mkdir()
    for name in ("b.png", "a.png"):
        Image.new("RGB", (9, 12), "white").save(images / name)
    main(["predict", "--config", "tiny.yaml", "--ckpt_path", "best", "--data.predict_dir", "images"])
    path = folder / "runs" / "tiny" / "0" / "predictions.csv"
    assert f"Predictions of 2 images: {path.relative_to(folder)}" in capsys.readouterr().out
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [Path(row["file"]).name for row in table] == ["a.png", "b.png"]
    assert 0 < float(table[0]["probability"]) <= 1
    assert table[0]["class"] in map(str, range(10))
