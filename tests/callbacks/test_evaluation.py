import csv
import json

import pytest
import standins
import torch
from standins import RandomData, RandomScenes, TinyFCN, TinyNet
from torch.utils.data import DataLoader, TensorDataset

from knlightning.callbacks.evaluation import EvaluationFiles
from knlightning.tasks import ClassificationTask, SegmentationTask
from knlightning.tasks.segmentation import class_scores

FILES = {"classes.csv", "confusion.csv", "confusion.png", "mistakes.html", "predictions.csv", "reliability.png"}


def evaluate(directory, task, data, stage="test", **kwargs):
    run = standins.trainer(None, EvaluationFiles(directory, **kwargs))
    getattr(run, stage)(task.eval(), data, verbose=False)
    return json.loads((directory / f"{stage}.json").read_text())


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_tables_of_images_say_what_the_network_predicts(tmp_path):
    task, data = ClassificationTask(TinyNet(3)), RandomData(samples=10, batch_size=4)
    data.class_names = ("x", "=1", "z")
    report = evaluate(tmp_path / "test", task, data, top_k=2)
    assert {path.name for path in (tmp_path / "test").iterdir()} == FILES | {"test.json"}
    images, labels = data.dataset.tensors
    probabilities = task(images).softmax(dim=1).detach()
    header, *rows = table(tmp_path / "test" / "predictions.csv")
    assert header == ["image", "label", "probability_of_label", "class", "probability", "class_2", "probability_2"]
    names = ["x", "'=1", "z"]
    for place, row in enumerate(rows):
        top = probabilities[place].topk(2)
        assert row[0] == str(place)
        assert row[1::2] == [names[labels[place]], *(names[index] for index in top.indices)]
        expected = [float(probabilities[place, labels[place]]), *top.values.tolist()]
        assert [float(value) for value in row[2::2]] == pytest.approx(expected, abs=1e-6)
    predicted = probabilities.argmax(dim=1)
    expected = [[int(((labels == t) & (predicted == p)).sum()) for p in range(3)] for t in range(3)]
    assert [list(map(int, row[1:])) for row in table(tmp_path / "test" / "confusion.csv")[1:]] == expected
    assert [int(row[-1]) for row in table(tmp_path / "test" / "classes.csv")[1:]] == [sum(row) for row in expected]
    right = float((predicted == labels).float().mean())
    assert report["scores"]["test/acc"] == pytest.approx(right)
    assert report["images"] == 10
    html = (tmp_path / "test" / "mistakes.html").read_text()
    assert html.count("<figure>") == int((predicted != labels).sum())


def test_a_rerun_replaces_the_folder_as_a_whole(tmp_path):
    directory = tmp_path / "validate"
    task, data = ClassificationTask(TinyNet(3)), RandomData()
    evaluate(directory, task, data, "validate")
    (directory / "old").touch()
    assert evaluate(directory, task, data, "validate")["scores"].keys() >= {"val/acc", "val/f1_mean"}
    assert {path.name for path in directory.iterdir()} == FILES | {"validate.json"}
    assert list(tmp_path.iterdir()) == [directory]


def test_scenes_have_scores_of_each_image_and_class(tmp_path):
    task, data = SegmentationTask(TinyFCN()), RandomScenes(samples=5, batch_size=2)
    report = evaluate(tmp_path / "test", task, data)
    predicted = task(data.images).argmax(dim=1)
    _, *rows = table(tmp_path / "test" / "predictions.csv")
    for place, row in enumerate(rows):
        known = data.labels[place] != 255
        pairs = data.labels[place][known] * 3 + predicted[place][known]
        scores = class_scores(torch.bincount(pairs, minlength=9).view(3, 3))
        assert [row[0], int(row[1])] == [str(place), int(known.sum())]
        assert [float(value) for value in row[2:]] == pytest.approx(
            [float(scores["pixel_acc"]), float(scores["miou"])], abs=1e-6
        )
    header, *classes = table(tmp_path / "test" / "classes.csv")
    assert header == ["class", "precision", "recall", "f1", "iou", "support"]
    assert [float(row[4]) for row in classes] == pytest.approx(
        [report["scores"][f"test/iou/{number}"] for number in range(3)], abs=1e-6
    )
    assert (tmp_path / "test" / "mistakes.html").read_text().count("<figure>") == 5


class Files(TensorDataset):
    """Images in files, of which the second cannot be read."""

    damaged = torch.tensor([False, True, False])

    def path_of(self, index):
        return f"{'abc'[index]}.png"


class FileData(RandomData):
    def test_dataloader(self):
        files = Files(*(tensor[:3] for tensor in self.dataset.tensors))

        def collate(samples):
            images, labels = zip(*(samples[i] for i in (0, 2)), strict=True)
            return torch.stack(images), torch.stack(labels)

        return DataLoader(files, 3, collate_fn=collate)


def test_files_are_named_also_where_some_could_not_be_read(tmp_path):
    evaluate(tmp_path / "test", ClassificationTask(TinyNet(3)), FileData())
    assert [row[0] for row in table(tmp_path / "test" / "predictions.csv")[1:]] == ["a.png", "c.png"]


class OwnTask(ClassificationTask):
    def test_step(self, batch, batch_idx):
        self.log("test/own", 0.5)


def test_a_task_without_logits_leaves_its_scores_alone(tmp_path):
    report = evaluate(tmp_path / "test", OwnTask(TinyNet(3)), RandomData())
    assert report["scores"]["test/own"] == 0.5
    assert [path.name for path in (tmp_path / "test").iterdir()] == ["test.json"]
