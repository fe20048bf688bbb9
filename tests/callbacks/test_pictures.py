import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from standins import RandomData, TinyNet
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from knlightning.callbacks import Pictures
from knlightning.callbacks.pictures import confusion_figure, predictions_figure
from knlightning.tasks import ClassificationTask


def fit(tmp_path, pictures, data, epochs=3, **kwargs):
    run = Trainer(
        logger=TensorBoardLogger(tmp_path, name="", version=""),
        callbacks=[pictures],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        max_epochs=epochs,
        log_every_n_steps=1,
        **kwargs,
    )
    run.fit(ClassificationTask(TinyNet(3)), data)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    return {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}


@pytest.mark.parametrize(("every", "steps"), [(1, [2, 5, 8]), (2, [5, 8]), (0, None)])
def test_drawn_every_few_epochs_and_after_the_last(tmp_path, every, steps):
    expected = {"val/confusion": steps, "val/predictions": steps} if steps else {}
    assert fit(tmp_path, Pictures(every), RandomData()) == expected  # a datamodule without names and way back


def test_names_and_way_back_come_from_the_datamodule(tmp_path, monkeypatch):
    data = RandomData(samples=10, batch_size=4)
    data.class_names, data.displayable = ("x", "y", "z"), lambda images: images.flip(1)
    seen = []
    monkeypatch.setattr(
        "knlightning.callbacks.pictures.predictions_figure",
        lambda *args: seen.append(args) or predictions_figure(*args),
    )
    fit(tmp_path, Pictures(images=6), data, epochs=1)
    ((images, labels, probabilities, names),) = seen
    assert torch.equal(images, data.dataset.tensors[0][:6].flip(1))
    assert torch.equal(labels, data.dataset.tensors[1][:6])
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(6))
    assert names == ("x", "y", "z")


def test_without_tensorboard_nothing_happens(tmp_path):
    run = Trainer(
        default_root_dir=tmp_path,
        logger=False,
        callbacks=[Pictures(1)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        max_epochs=1,
    )
    run.fit(ClassificationTask(TinyNet(3)), RandomData())


def test_confusion_counts_are_written_into_the_cells():
    figure = confusion_figure(torch.tensor([[3, 1], [0, 2]]), ["cat", "dog"])
    axes = figure.axes[0]
    assert [(text.get_position(), text.get_text()) for text in axes.texts] == [
        ((0, 0), "3"),
        ((1, 0), "1"),
        ((1, 1), "2"),
    ]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog"]
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25], [0, 1]]


def test_many_classes_are_not_named():
    assert not confusion_figure(torch.eye(100), [str(k) for k in range(100)]).axes[0].texts


def test_wrong_predictions_are_red_and_say_what_is_true():
    probabilities = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
    figure = predictions_figure(torch.rand(2, 1, 4, 4), torch.tensor([0, 0]), probabilities, ["cat", "dog"])
    titles = [(axes.get_title(), axes.title.get_color()) for axes in figure.axes]
    assert titles == [("cat (90%)", "black"), ("dog (70%)\nis cat", "red")]


@pytest.mark.parametrize("arguments", [{"every_n_epochs": -1}, {"images": -1}])
def test_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match="at least 0"):
        Pictures(**arguments)
