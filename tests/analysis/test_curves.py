import numpy as np
import pytest

from knlightning.analysis.curves import (
    COLOURS,
    draw_convergence,
    draw_curves,
    draw_scores,
    mean_curve,
    read_metrics,
    styles_of,
)
from knlightning.nn.normalization import NORMS

METRICS = """step,lr-SGD,val/loss,val/acc,epoch,train/loss,train/acc
0,0.1,,,,,
44,,0.7,0.75,0,,
44,,,,0,0.9,0.6
89,,0.5,0.8,1,,
89,,,,1,0.6,0.7
"""


def test_metrics_are_read_by_epoch(tmp_path):
    (tmp_path / "metrics.csv").write_text(METRICS)
    metrics = read_metrics(tmp_path)
    assert metrics["val/acc"] == [(0, 0.75), (1, 0.8)]
    assert metrics["train/loss"] == [(0, 0.9), (1, 0.6)]


def test_the_mean_iou_of_segmentation_takes_the_place_of_the_accuracy(tmp_path):
    (tmp_path / "metrics.csv").write_text(METRICS.replace("/acc", "/miou"))
    figure = draw_curves([tmp_path])
    assert figure.axes[1].get_ylabel() == "mean IoU"
    assert [list(line.get_ydata()) for line in figure.axes[1].lines] == [[0.6, 0.7], [0.75, 0.8]]
    (axes,) = draw_convergence({"batch size 8": {"x": [tmp_path]}}).axes
    assert axes.get_ylabel() == "validation mean IoU in % (not linear: stretched towards 100)"
    assert axes.lines[0].get_xydata() == pytest.approx(np.array([[1, 75], [2, 80]]))


def test_a_directory_without_metrics_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .*metrics\.csv: name the directory of a run"):
        draw_curves([tmp_path])


def write_run(path, *accuracies):
    path.mkdir()
    lines = [f"{10 * epoch},{accuracy},{epoch}\n" for epoch, accuracy in enumerate(accuracies)]
    (path / "metrics.csv").write_text("step,val/acc,epoch\n" + "".join(lines))
    return path


def test_convergence_is_the_mean_over_runs_and_its_spread(tmp_path):
    one, two, three = (
        write_run(tmp_path / name, *values) for name, values in (("a", (0.5, 0.9)), ("b", (0.7, 0.9)), ("c", (0.2,)))
    )
    figure = draw_convergence({"batch size 2": {"x": [one, two], "y": [three]}, "batch size 32": {"y": [one], "z": []}})
    first, second = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["batch size 2", "batch size 32"]
    assert first.lines[0].get_xydata() == pytest.approx(np.array([[1, 60], [2, 90]]))
    assert first.lines[1].get_xydata() == pytest.approx(np.array([[1, 20]]))
    (band,) = first.collections[0].get_paths()
    low, high = band.vertices[:, 1].min(), band.vertices[:, 1].max()
    assert low == pytest.approx(60 - 200**0.5)  # the standard deviation of 50 and 70 is the root of 200
    assert high == pytest.approx(90)
    assert second.lines[0].get_color() == first.lines[1].get_color() != first.lines[0].get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["x", "y", "z"]
    figure.savefig(tmp_path / "convergence.png")


def test_of_several_validations_in_an_epoch_the_last_counts(tmp_path):
    """And epochs are in their order, whichever run has them."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.csv").write_text("step,val/acc,epoch\n5,0.1,1\n9,0.5,1\n19,0.75,2\n")
    places, means, spreads = mean_curve([tmp_path / "a", write_run(tmp_path / "b", 0.25)], "val/acc")
    assert (places.tolist(), means.tolist(), spreads.tolist()) == ([1, 2, 3], [0.25, 0.5, 0.75], [0, 0, 0])


@pytest.mark.parametrize(("x", "expected"), [("epochs", [1, 2]), ("steps", [45, 90]), ("hours", [3 / 3600, 4 / 3600])])
def test_curves_are_means_over_seeds(tmp_path, x, expected):
    """One seed takes 2 s for each epoch, the other one 4 s and then nothing."""
    for name, seconds in (("0", (2, 2)), ("1", (4, 0))):
        (tmp_path / name).mkdir()
        text = METRICS if name == "0" else METRICS.replace("0.8,1", "0.4,1")
        lines = text.splitlines()
        timed = [f"{line}," for line in lines[1:]] + [f"44,,,,{epoch},,,{s}" for epoch, s in enumerate(seconds)]
        (tmp_path / name / "metrics.csv").write_text(
            "\n".join([lines[0] + ",train/seconds", *timed]).replace("44,,,,1", "89,,,,1")
        )
    figure = draw_curves({"mine": [tmp_path / "0", tmp_path / "1"]}, x)
    loss, accuracy = figure.axes
    assert accuracy.lines[1].get_xydata() == pytest.approx(np.array([*zip(expected, [0.75, 0.6], strict=True)]))
    band = accuracy.collections[1].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(0.6 - 0.08**0.5)
    assert loss.get_xlabel() == x
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["train", "val"]


def test_hours_that_were_not_logged(tmp_path):
    (tmp_path / "metrics.csv").write_text(METRICS)
    with pytest.raises(ValueError, match=r"x must be epochs or steps, got 'hours'. .* has not logged its time"):
        draw_curves([tmp_path], "hours")


def test_a_normalization_has_one_colour_and_every_line_its_own_style():
    assert COLOURS.keys() == NORMS.keys()
    names = ["ResNet-8, kernel", "ResNet-8, group", "KNResNet-8, kernel", "resnet8", "vgg"]
    styles = styles_of(names)
    assert [styles[name]["color"] for name in names[:3]] == [COLOURS["kernel"], COLOURS["group"], COLOURS["kernel"]]
    assert len({style["marker"] for style in styles.values()}) == 5
    assert len({(style["color"], style["linestyle"]) for style in styles.values()}) == 5


def test_scores_of_a_table():
    scores = {"group": {"ε = 8": [90.0, 92.0], "ε = 1": [70.0]}, "none": {"ε = 8": [80.0, 80.0]}}
    (axes,) = draw_scores(scores, "test accuracy in %").axes
    lines = {handle.get_label(): handle.lines[0].get_xydata().tolist() for handle in axes.containers}
    aside = pytest.approx(-0.1), pytest.approx(0.9)
    assert lines == {"group": [[aside[0], 91.0], [aside[1], 70.0]], "none": [[pytest.approx(0.1), 80.0]]}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["ε = 8", "ε = 1"]
    (low, high) = axes.containers[0].lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((91 - 2**0.5, 91 + 2**0.5))
