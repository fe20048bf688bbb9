import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningDataModule
from PIL import Image
from standins import RandomScenes, TinyFCN, trainer
from torch import nn
from torch.utils.data import DataLoader

from knlightning.callbacks import PredictionWriter
from knlightning.callbacks.predictions import png_name, write_pictures
from knlightning.tasks import ClassificationTask, SegmentationTask

LOGITS = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 4.0], [0.0, 0.0, 9.0]])


class Files(LightningDataModule):
    def predict_dataloader(self):
        rows = list(zip(LOGITS, ["c.png", "a.png", "b.png"], strict=True))
        return DataLoader(rows, batch_size=2)


def write_table(tmp_path, data, top_k=1):
    writer = PredictionWriter(top_k)
    trainer(tmp_path, writer).predict(ClassificationTask(nn.Identity()), data, return_predictions=False)
    return writer


@pytest.mark.parametrize(("top_k", "named"), [(1, 1), (2, 2), (5, 3)])
@pytest.mark.parametrize("names", [None, ("cat", "dog", "owl")])
def test_table(tmp_path, top_k, named, names):
    data = Files()
    if names:
        data.class_names = names
    writer = write_table(tmp_path, data, top_k)
    with (tmp_path / "predictions.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    every = ["file", "class", "probability", "class_2", "probability_2", "class_3", "probability_3"]
    assert header == every[: 1 + 2 * named]
    assert (writer.rows, writer.path) == (3, tmp_path / "predictions.csv")
    names = names or ("0", "1", "2")
    for row, logits in zip(rows, LOGITS[[1, 2, 0]], strict=True):
        assert [row[1 + 2 * k] for k in range(named)] == [
            names[index] for index in logits.argsort(descending=True, stable=True)[:named]
        ]
        expected = logits.softmax(dim=0).sort(descending=True).values[:named]
        assert [float(row[2 + 2 * k]) for k in range(named)] == pytest.approx(expected.tolist(), abs=1e-6)
    assert [row[0] for row in rows] == ["a.png", "b.png", "c.png"]


ODD = ["=1+1.png", "caf\udce9.png", "\x1b[2J.png"]


class OddNames(LightningDataModule):
    class_names = ("@SUM(A1)", "Gr\udcfc\u00fc", "owl")

    def __init__(self, act=None):
        super().__init__()
        self.act = act

    def predict_dataloader(self):
        return DataLoader(list(zip(LOGITS, ODD, strict=True)), batch_size=1)

    def on_before_batch_transfer(self, batch, dataloader_idx):
        if self.act and list(batch[1]) == [ODD[2]]:
            self.act()
        return batch


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return [row[:2] for row in csv.reader(file)]


def test_names_of_any_kind_can_be_written(tmp_path):
    write_table(tmp_path, OddNames())
    assert rows_of(tmp_path / "predictions.csv") == [
        ["file", "class"],
        [r"\x1b[2J.png", "owl"],
        ["'=1+1.png", r"Gr\udcfc" + "\u00fc"],
        [r"caf\udce9.png", "'@SUM(A1)"],
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.csv"]


def test_what_was_predicted_before_an_error_is_kept(tmp_path):
    def fail():
        raise ValueError("a damaged image")

    with (
        pytest.raises(ValueError, match="a damaged image"),
        pytest.warns(UserWarning, match=r"stopped after 2 images, which are in .*predictions\.partial\.csv"),
    ):
        write_table(tmp_path, OddNames(fail))
    assert rows_of(tmp_path / "predictions.partial.csv") == [
        ["file", "class"],
        ["'=1+1.png", r"Gr\udcfc" + "\u00fc"],
        [r"caf\udce9.png", "'@SUM(A1)"],
    ]
    assert not (tmp_path / "predictions.csv").exists()
    write_table(tmp_path, OddNames())
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.csv"]


def test_rows_are_there_before_the_end(tmp_path):
    def look():
        assert len(rows_of(tmp_path / "predictions.partial.csv")) == 3

    write_table(tmp_path, OddNames(look))


def test_top_k_out_of_range():
    with pytest.raises(ValueError, match="top_k"):
        PredictionWriter(0)


# segmentation

NAMES = ["b/x.png", "a/x.png", "a/x.jpg", "a/x.jpg.png"]


class Scenes(RandomScenes):
    num_classes = 3

    def __init__(self, folder, names=NAMES):
        super().__init__(samples=len(names), batch_size=2)
        self.names = [str(folder / name) for name in names]

    def predict_dataloader(self):
        return DataLoader(list(zip(self.images, self.names, strict=True)), batch_size=2)


def predict(tmp_path, data):
    writer, task = PredictionWriter(), SegmentationTask(TinyFCN()).eval()
    trainer(tmp_path / "run", writer).predict(task, data, return_predictions=False)
    return writer, task(data.images).argmax(dim=1)


def read(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def test_pictures_of_label_maps(tmp_path):
    data = Scenes(tmp_path / "in")
    data.predict_dir = tmp_path / "in"
    data.palette, data.label_ids = ((10, 20, 30), (40, 50, 60), (200, 100, 0)), (7, 33, 21)
    data.displayable = lambda images: images / 2
    writer, predicted = predict(tmp_path, data)
    root = tmp_path / "run" / "predictions"
    assert (writer.path, writer.rows) == (root, 4)
    written = ["b/x.png", "a/x.png", "a/x.jpg.png", "a/x.jpg.png.png"]
    for folder in ("colours", "overlays", "label_ids"):
        files = {str(path.relative_to(root / folder)) for path in (root / folder).rglob("*") if path.is_file()}
        assert files == set(written)  # nothing temporary is left
    for name, image, label_map in zip(written, data.images, predicted.numpy(), strict=True):
        colours = np.array(data.palette)[label_map]
        assert np.array_equal(read(root / "colours" / name), colours)
        assert np.array_equal(read(root / "label_ids" / name), np.array(data.label_ids)[label_map])
        pixels = (image / 2 * 255).round().permute(1, 2, 0).numpy()
        assert np.abs(read(root / "overlays" / name) - (pixels + colours) / 2).max() <= 0.5


def test_pictures_take_the_place_of_earlier_ones_once_all_are_there(tmp_path):
    names = ["1.png", "2.png", "3.png"]
    predict(tmp_path, Scenes(tmp_path, ["old.png"]))
    data = Scenes(tmp_path, names)
    batches = iter([1, 0])
    data.displayable = lambda images: images * (1 // next(batches))
    with pytest.raises(ZeroDivisionError), pytest.warns(UserWarning, match=r"which are in .*predictions\.partial"):
        predict(tmp_path, data)
    folder = tmp_path / "run" / "predictions"
    assert [path.name for path in folder.rglob("label_ids/**/*.png")] == ["old.png"]
    predict(tmp_path, Scenes(tmp_path, names))
    assert sorted(path.name for path in folder.rglob("label_ids/**/*.png")) == names
    assert sorted(path.name for path in folder.parent.iterdir()) == ["predictions", "predictions.html"]


def test_pictures_without_what_our_datamodules_have(tmp_path):
    data = Scenes(tmp_path / "in")
    _, predicted = predict(tmp_path, data)
    root = tmp_path / "run" / "predictions"
    where = tmp_path.relative_to(tmp_path.anchor) / "in" / "b" / "x.png"
    assert np.array_equal(read(root / "label_ids" / where), predicted[0].numpy())
    assert len(np.unique(read(root / "colours" / where).reshape(-1, 3), axis=0)) == len(predicted[0].unique())


def test_more_than_256_classes_are_written_in_16_bits(tmp_path):
    label_map = torch.tensor([[0, 300], [255, 256]])
    write_pictures(tmp_path, Path("a.png"), torch.rand(1, 2, 2), label_map, None)
    assert np.array_equal(read(tmp_path / "label_ids" / "a.png"), label_map.numpy())


@given(
    st.lists(
        st.text("ab.", max_size=3).flatmap(
            lambda s: st.sampled_from([".png", ".jpg", ".PNG", ".tiff"]).map(lambda suffix: f"n{s}{suffix}")
        ),
        unique=True,
    )
)
def test_no_two_images_have_a_picture_of_the_same_name(names):
    names += [f"{name}.png" for name in names if f"{name}.png" not in names]
    pictures = [str(png_name(Path(name))) for name in names]
    assert len(set(pictures)) == len(names)
    assert all(picture.lower().endswith(".png") for picture in pictures)
