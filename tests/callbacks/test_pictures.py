import warnings

import pytest
import standins
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from standins import RandomData, RandomScenes, TinyFCN, TinyNet
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from knlightning.callbacks import Pictures
from knlightning.callbacks.pictures import (
    confusion_figure,
    iou_figure,
    predictions_figure,
    scenes_figure,
    spread_over_classes,
)
from knlightning.tasks import ClassificationTask, SegmentationTask


def fit(tmp_path, pictures, data, epochs=3, task=None, **kwargs):
    run = standins.trainer(
        None,
        pictures,
        logger=TensorBoardLogger(tmp_path, name="", version=""),
        max_epochs=epochs,
        log_every_n_steps=1,
        **kwargs,
    )
    run.fit(task or ClassificationTask(TinyNet(3)), data)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    return {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}


@pytest.mark.parametrize(("every", "steps"), [(1, [2, 5, 8]), (2, [5, 8]), (0, None)])
def test_drawn_every_few_epochs_and_after_the_last(tmp_path, every, steps):
    expected = {"val/confusion": steps, "val/predictions": steps} if steps else {}
    assert fit(tmp_path, Pictures(every, images=1), RandomData()) == expected  # a datamodule without names and way back


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
    all_images, all_labels = data.dataset.tensors
    wrong = probabilities.argmax(dim=1) != labels
    assert wrong.tolist() == sorted(wrong.tolist(), reverse=True)
    places = [next(i for i, other in enumerate(all_images) if torch.equal(other.flip(0), image)) for image in images]
    assert len(set(places)) == 6
    assert torch.equal(labels, all_labels[places])
    counts, there = labels.bincount(minlength=3), all_labels.bincount(minlength=3)
    assert ((counts == 2) | (counts >= there.clamp(max=2))).all()  # of each class equally many
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(6))
    assert names == ("x", "y", "z")


def test_images_of_all_classes_are_chosen_and_wrong_ones_first():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 0])
    wrong = torch.tensor([0, 0, 0, 1, 0, 1, 0, 1], dtype=torch.bool)
    assert spread_over_classes(labels, wrong, 2).tolist() == [3, 5]
    assert spread_over_classes(labels, wrong, 5).tolist() == [3, 4, 5, 6, 7]
    assert spread_over_classes(labels, wrong, 9).tolist() == list(range(8))
    generator = torch.Generator().manual_seed(0)
    labels, wrong = torch.randint(7, (90,), generator=generator), torch.rand(90, generator=generator) < 0.2
    kept = torch.arange(0)
    for batch in torch.arange(90).split(8):  # in parts as at once
        kept = torch.cat((kept, batch))
        kept = kept[spread_over_classes(labels[kept], wrong[kept], 24)]
    assert torch.equal(kept, spread_over_classes(labels, wrong, 24))


def test_without_tensorboard_nothing_happens(tmp_path):
    run = standins.trainer(tmp_path, Pictures(1), max_epochs=1)
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


def test_long_titles_go_on_in_the_next_line():
    names = ["Egyptian $mau$ of a very very long name that is cut", "cat"]
    figure = predictions_figure(torch.rand(1, 1, 4, 4), torch.tensor([0]), torch.tensor([[0.1, 0.9]]), names)
    lines = figure.axes[0].get_title().splitlines()
    assert lines == ["cat (90%)", r"is Egyptian \$mau\$", "of a very very", "long name"]


@pytest.mark.parametrize("arguments", [{"every_n_epochs": -1}, {"images": -1}])
def test_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match="must be a whole number at least 0"):
        Pictures(**arguments)


# segmentation


class Coloured(RandomScenes):
    num_classes, class_names = 3, ("road", "sky", "person")
    palette = ((128, 64, 128), (70, 130, 180), (220, 20, 60))

    def displayable(self, images):
        return images.flip(1)


@pytest.mark.parametrize("kind", [RandomScenes, Coloured])
def test_scenes_are_drawn_with_the_iou_of_each_class(tmp_path, kind):
    steps = fit(tmp_path, Pictures(images=2), kind(), epochs=1, task=SegmentationTask(TinyFCN()))
    assert steps == {"val/confusion": [2], "val/iou": [2], "val/predictions": [2]}


def test_scenes_and_counts_are_those_of_the_validation(tmp_path, monkeypatch):
    data, net = Coloured(size=(8, 10)), TinyFCN(dropout_p=0.0)
    seen = {}
    for figure in (confusion_figure, iou_figure, scenes_figure):
        monkeypatch.setattr(
            f"knlightning.callbacks.pictures.{figure.__name__}",
            lambda *args, figure=figure: seen.update({figure.__name__: args}) or figure(*args),
        )
    still = SegmentationTask(net, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    fit(tmp_path, Pictures(images=6), data, epochs=1, task=still)
    predicted = net(data.images).argmax(dim=1)
    counts, names = seen["confusion_figure"]
    expected = torch.zeros(3, 3, dtype=torch.long)
    for true, guess in zip(data.labels.flatten(), predicted.flatten(), strict=True):
        if true != 255:
            expected[true, guess] += 1
    assert torch.equal(counts, expected)
    assert names == data.class_names
    hits = expected.diagonal()
    torch.testing.assert_close(seen["iou_figure"][0], hits / (expected.sum(0) + expected.sum(1) - hits))
    scenes, palette, shown_names = seen["scenes_figure"]
    assert shown_names == data.class_names
    assert len(scenes) == 6
    for i, (image, labels, guess) in enumerate(scenes):
        assert torch.equal(image, data.images[i].flip(0))
        assert torch.equal(labels, data.labels[i])
        assert torch.equal(guess, predicted[i])
    assert palette.tolist() == [list(colour) for colour in (*data.palette, (0, 0, 0))]


def test_large_scenes_are_thinned_out_and_few(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("knlightning.callbacks.pictures.SCENE_SIDE", 4)
    monkeypatch.setattr(
        "knlightning.callbacks.pictures.scenes_figure", lambda *args: seen.extend(args[0]) or scenes_figure(*args)
    )
    data = RandomScenes(samples=10, batch_size=4, size=(8, 13))
    fit(tmp_path, Pictures(), data, epochs=1, task=SegmentationTask(TinyFCN()))
    assert len(seen) == 8
    assert all(image.shape == (3, 3, 5) for image, _, _ in seen)
    assert all(torch.equal(labels, data.labels[i, ::3, ::3]) for i, (_, labels, _) in enumerate(seen))


def test_truth_and_prediction_are_black_where_pixels_are_ignored():
    palette = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 0]], dtype=torch.uint8)
    labels, predicted = torch.tensor([[0, 1], [255, 1]]), torch.tensor([[1, 1], [1, 0]])
    figure = scenes_figure([(torch.rand(3, 2, 2), labels, predicted)], palette, ["sky", "$"])
    image, truth, prediction = figure.axes
    (legend,) = figure.legends
    named = {
        text.get_text(): patch.get_facecolor()[:3]
        for text, patch in zip(legend.texts, legend.get_patches(), strict=True)
    }
    assert named == {"sky": (1, 0, 0), r"\$": (0, 1, 0), "not counted": (0, 0, 0)}
    red, green, black = ([255, 0, 0], [0, 255, 0], [0, 0, 0])
    assert truth.images[0].get_array().tolist() == [[red, green], [black, green]]
    assert prediction.images[0].get_array().tolist() == [[green, green], [black, red]]
    assert [axes.get_title() for axes in (image, truth, prediction)] == ["image", "truth", "prediction"]


def test_counts_of_pixels_are_written_as_shares():
    axes = confusion_figure(torch.tensor([[9_000, 11_000], [1, 20_000]]), ["road", "sky"]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["45%", "55%", "", "100%"]


def test_bars_of_the_iou():
    figure = iou_figure(torch.tensor([0.5, float("nan"), 0.25]), ["road", "sky", "person"])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.500", "no pixels", "0.250"]
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0.0, 0.25]
    assert figure.legends[0].get_texts()[0].get_text() == "mean 0.375"


ODD = ["Ba$$in", "$\\frac{$", "Gr\udcfcn \x1b[2J", "\U0001f408 \u732b", "long " * 100]


@pytest.mark.parametrize("task", [None, SegmentationTask])
def test_names_of_any_kind_are_drawn(tmp_path, task):
    data = (RandomScenes if task else RandomData)()
    data.class_names = ODD[:3]
    steps = fit(tmp_path, Pictures(), data, epochs=1, task=task and task(TinyFCN()))
    assert len(steps) == (3 if task else 2)


def test_names_are_shown_as_they_are():
    figure = confusion_figure(torch.eye(5), ODD)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        figure.canvas.draw()
    shown = [text.get_text().replace(r"\$", "$") for text in figure.axes[0].get_yticklabels()]
    assert shown == ["Ba$$in", "$\\frac{$", r"Gr\udcfcn \x1b[2J", "\U0001f408 \u732b", ("long " * 100)[:40]]


def test_what_cannot_be_drawn_does_not_end_the_run(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no font")

    monkeypatch.setattr("knlightning.callbacks.pictures.confusion_figure", fail)
    with pytest.warns(UserWarning, match=r"Left out: the picture val/confusion \(RuntimeError: no font\)") as said:
        assert fit(tmp_path, Pictures(1), RandomData(), epochs=2) == {"val/predictions": [2, 5]}
    assert len([warning for warning in said if "Left out" in str(warning.message)]) == 1


def test_many_classes_have_no_confusion_matrix(tmp_path, monkeypatch):
    monkeypatch.setattr("knlightning.callbacks.pictures.MOST_CLASSES", 2)
    with pytest.warns(UserWarning, match="Left out: the confusion matrix .3 classes, at most 2"):
        assert fit(tmp_path, Pictures(1), RandomData(), epochs=1) == {"val/predictions": [2]}
    with pytest.warns(UserWarning, match="Left out: the confusion matrix"):
        steps = fit(tmp_path / "b", Pictures(1), RandomScenes(), epochs=1, task=SegmentationTask(TinyFCN()))
    assert steps == {"val/predictions": [2]}
