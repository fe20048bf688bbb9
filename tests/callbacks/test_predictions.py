import csv

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from knlightning.callbacks import PredictionWriter
from knlightning.tasks import ClassificationTask

LOGITS = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 4.0], [0.0, 0.0, 9.0]])


class Files(LightningDataModule):
    def predict_dataloader(self):
        rows = list(zip(LOGITS, ["c.png", "a.png", "b.png"], strict=True))
        return DataLoader(rows, batch_size=2)


@pytest.mark.parametrize(("top_k", "named"), [(1, 1), (2, 2), (5, 3)])
@pytest.mark.parametrize("names", [None, ("cat", "dog", "owl")])
def test_table(tmp_path, top_k, named, names):
    data = Files()
    if names:
        data.class_names = names
    writer = PredictionWriter(top_k)
    run = Trainer(default_root_dir=tmp_path, logger=False, callbacks=[writer], enable_progress_bar=False)
    run.predict(ClassificationTask(nn.Identity()), data, return_predictions=False)
    with (tmp_path / "predictions.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert (
        header
        == ["file", "class", "probability", "class_2", "probability_2", "class_3", "probability_3"][: 1 + 2 * named]
    )
    assert (writer.rows, writer.path) == (3, tmp_path / "predictions.csv")
    names = names or ("0", "1", "2")
    for row, logits in zip(rows, LOGITS[[1, 2, 0]], strict=True):
        assert [row[1 + 2 * k] for k in range(named)] == [
            names[index] for index in logits.argsort(descending=True, stable=True)[:named]
        ]
        expected = logits.softmax(dim=0).sort(descending=True).values[:named]
        assert [float(row[2 + 2 * k]) for k in range(named)] == pytest.approx(expected.tolist(), abs=1e-6)
    assert [row[0] for row in rows] == ["a.png", "b.png", "c.png"]


def test_top_k_out_of_range():
    with pytest.raises(ValueError, match="top_k"):
        PredictionWriter(0)
