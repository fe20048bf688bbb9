import math
from functools import partial

import pytest
import standins
import torch
from standins import RandomScenes, TinyFCN
from torch import nn
from torch.nn import functional as F

from knlightning.callbacks import BestCheckpoint
from knlightning.tasks import SegmentationTask
from knlightning.tasks.inference import averaged_logits, by_tiles
from knlightning.tasks.losses import mean_of_pixels, quotient
from knlightning.tasks.segmentation import CLASS_WEIGHTS, class_scores

trainer = partial(standins.trainer, max_epochs=1)


def network(classes=3):
    torch.manual_seed(1)
    return TinyFCN(classes, dropout_p=0.0)


def loss(logits, data, weights, *how):
    losses = F.cross_entropy(logits, data.labels, ignore_index=255, reduction="none")
    return quotient(*mean_of_pixels(losses, data.labels, torch.tensor(weights), *how)).item()


def naive_scores(predicted, labels, classes):
    """Count pixel by pixel."""
    counts = [[0] * classes for _ in range(classes)]
    for right, guess in zip(labels.flatten().tolist(), predicted.flatten().tolist(), strict=True):
        if right != 255:
            counts[right][guess] += 1
    ious, recalls = [], []
    for k in range(classes):
        true, guessed = sum(counts[k]), sum(row[k] for row in counts)
        union = true + guessed - counts[k][k]
        ious.append(counts[k][k] / union if union else math.nan)
        recalls.append(counts[k][k] / true if true else math.nan)
    present = [iou for iou in ious if not math.isnan(iou)]
    recalls = [recall for recall in recalls if not math.isnan(recall)]
    hits = sum(counts[k][k] for k in range(classes))
    scores = {"miou": sum(present) / len(present), "mean_acc": sum(recalls) / len(recalls)}
    return scores | {"pixel_acc": hits / sum(map(sum, counts)), **{f"iou/{k}": iou for k, iou in enumerate(ious)}}


@pytest.mark.parametrize("loss_mean", ["batch", "image"])
@pytest.mark.parametrize("stage", ["val", "test"])
def test_metrics_equal_a_naive_computation_over_all_pixels(tmp_path, stage, loss_mean):
    data, net = RandomScenes(samples=10, batch_size=4, classes=4), network(5)  # the last class never occurs
    with torch.no_grad():
        net.head.bias[4] = -100.0  # nor is it predicted
    data.labels[data.labels == 3] = 2  # this one is predicted, but never true
    weights = [1.0, 2.0, 0.5, 1.0, 1.0]
    task = SegmentationTask(net, weights, loss_mean, ohem_threshold=0.1)
    run = trainer(tmp_path)
    (run.validate if stage == "val" else run.test)(task, data, verbose=False)
    logits = net(data.images)
    expected = naive_scores(logits.argmax(dim=1), data.labels, 5)
    expected = {f"{stage}/{name}": pytest.approx(value, nan_ok=True) for name, value in expected.items()}
    expected[f"{stage}/loss"] = pytest.approx(loss(logits.double(), data, weights, loss_mean), rel=1e-5)
    assert {name: value.item() for name, value in run.callback_metrics.items()} == expected
    assert math.isnan(run.callback_metrics[f"{stage}/iou/4"])
    assert run.callback_metrics[f"{stage}/iou/3"] == 0


def test_training_metrics_are_those_of_all_pixels_and_begin_anew_with_each_epoch(tmp_path):
    data, net = RandomScenes(), network()
    task = SegmentationTask(net, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    for epochs in (1, 3):
        run = trainer(tmp_path, max_epochs=epochs)
        run.fit(task, data)
        logits = net(data.images)
        expected = naive_scores(logits.argmax(dim=1), data.labels, 3)
        expected["loss"] = F.cross_entropy(logits, data.labels, ignore_index=255).item()
        for name in ("loss", "miou", "pixel_acc", "mean_acc"):
            for stage in ("train", "val"):
                assert run.callback_metrics[f"{stage}/{name}"].item() == pytest.approx(expected[name]), name
    assert not any(name.startswith("train/iou") for name in run.callback_metrics)


def test_scores_of_a_matrix_by_hand():
    scores = class_scores(torch.tensor([[3, 1, 0, 0], [0, 4, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0]]))
    torch.testing.assert_close(scores["iou"], torch.tensor([3 / 4, 4 / 7, 0.0, math.nan]), equal_nan=True)
    assert scores["miou"].item() == pytest.approx((3 / 4 + 4 / 7) / 3)
    assert scores["pixel_acc"].item() == pytest.approx(7 / 10)
    assert scores["mean_acc"].item() == pytest.approx((3 / 4 + 1 + 0) / 3)


def test_names_of_the_classes_come_from_the_datamodule(tmp_path):
    data = RandomScenes()
    data.num_classes, data.class_names = 3, ("road", "traffic light", "sky")
    run = trainer(tmp_path)
    run.validate(SegmentationTask(network()), data, verbose=False)
    names = {name for name in run.callback_metrics if name.startswith("val/iou/")}
    assert names == {"val/iou/road", "val/iou/traffic light", "val/iou/sky"}


def test_nothing_labelled(tmp_path):
    data = RandomScenes()
    data.labels[:] = 255
    run = trainer(tmp_path)
    net = network()
    before = net.head.weight.detach().clone()
    run.fit(SegmentationTask(net), data)
    assert run.callback_metrics["train/loss"] == run.callback_metrics["val/loss"] == 0
    assert math.isnan(run.callback_metrics["val/miou"])
    assert torch.equal(net.head.weight, before)


def test_trains_with_all_that_changes_the_loss(tmp_path):
    data, net = RandomScenes(samples=4), network()
    weights = [1.0, 3.0, 0.5]
    task = SegmentationTask(net, weights, "image", 0.3, 7, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    run = trainer(tmp_path, limit_val_batches=0)
    run.fit(task, data)
    assert run.callback_metrics["train/loss"].item() == pytest.approx(
        loss(net(data.images), data, weights, "image", 0.3, 7)
    )


def test_evaluation_and_prediction_see_images_as_the_options_say(tmp_path):
    data, net = RandomScenes(), network()
    ways = {"window": (4, 6), "stride": (3, 2), "flip": True, "scales": [0.75, 1.0]}
    task = SegmentationTask(net, **{f"eval_{name}": value for name, value in ways.items()})
    run = trainer(tmp_path)
    logits = averaged_logits(net, data.images, **ways)
    expected = naive_scores(logits.argmax(dim=1), data.labels, 3)
    run.validate(task, data, verbose=False)
    assert run.callback_metrics["val/miou"].item() == pytest.approx(expected["miou"])
    assert not torch.equal(logits.argmax(dim=1), net(data.images).argmax(dim=1))
    assert torch.equal(torch.cat(run.predict(task, data)), logits.argmax(dim=1))


def test_validation_step_gives_predictions_to_the_callbacks(tmp_path):
    seen = []

    class Spy(SegmentationTask):
        def on_validation_batch_end(self, outputs, batch, batch_idx):
            seen.append(outputs)

    data, net = RandomScenes(), network()
    trainer(tmp_path).validate(Spy(net), data, verbose=False)
    probabilities, classes = net(data.images).softmax(dim=1).max(dim=1)
    torch.testing.assert_close(torch.cat([each["probabilities"] for each in seen]), probabilities)
    assert torch.equal(torch.cat([each["classes"] for each in seen]), classes)
    assert {each["num_classes"] for each in seen} == {3}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(tmp_path, precision):
    run = trainer(tmp_path, precision=precision, accumulate_grad_batches=2)
    run.fit(SegmentationTask(network(), [1.0, 2.0, 3.0], eval_flip=True, ohem_threshold=0.5), RandomScenes())
    assert run.global_step == 2
    assert run.callback_metrics["val/loss"].isfinite()


def test_checkpoint_needs_no_code_to_load_and_does_not_hold_the_weights_of_the_classes(tmp_path):
    run = trainer(tmp_path)
    task = SegmentationTask(network(), [1.0, 2.0, 3.0], eval_window=(4, 4))
    run.fit(task, RandomScenes())
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert stored["hyper_parameters"]["class_weights"] == [1.0, 2.0, 3.0]
    assert set(stored["state_dict"]) == {"backbone.head.weight", "backbone.head.bias"}
    loaded = SegmentationTask.load_from_checkpoint(tmp_path / "a.ckpt", backbone=network())
    assert loaded.eval_window == (4, 4)


def test_weights_of_cityscapes(tmp_path):
    assert SegmentationTask(network(), "cityscapes").class_weights.tolist() == pytest.approx(
        CLASS_WEIGHTS["cityscapes"]
    )
    assert len(CLASS_WEIGHTS["cityscapes"]) == 19
    with pytest.raises(ValueError, match=r"class_weights are 19 numbers, and the network has 3 classes"):
        trainer(tmp_path).fit(SegmentationTask(network(), "cityscapes"), RandomScenes())


@pytest.mark.parametrize("sanity", [0, 2])
def test_width_is_compared_with_the_data_before_the_first_step(tmp_path, sanity):
    data = RandomScenes()
    data.num_classes = 7
    run = trainer(tmp_path, num_sanity_val_steps=sanity)
    with pytest.raises(ValueError, match=r"3 outputs .* 7 classes: set the backbone's num_classes to 7"):
        run.fit(SegmentationTask(network()), data)
    assert run.global_step == 0
    with pytest.raises(ValueError, match=r"3 outputs .* 7 classes"):
        run.predict(SegmentationTask(network()), data)


@pytest.mark.parametrize("label", [3, -1, 254])
def test_labels_outside_of_the_classes(tmp_path, label):
    data = RandomScenes()
    data.labels[0, 2, 3] = label
    with pytest.raises(ValueError, match=rf"label {label}, and the network has 3 classes: labels must be 0 to 2"):
        trainer(tmp_path).fit(SegmentationTask(network()), data)


def test_labels_of_another_shape(tmp_path):
    data = RandomScenes()
    with pytest.raises(ValueError, match=r"labels of the shape \(4, 8, 10\) do not fit logits .* \(4, 3, 4, 5\)"):
        trainer(tmp_path).validate(SegmentationTask(nn.Sequential(network(), nn.AvgPool2d(2))), data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_weights": []}, "class_weights must be a list of numbers, one for each class"),
        ({"class_weights": [1.0, -1.0]}, r"class_weights\[1\] must be a number at least 0, got -1.0"),
        ({"class_weights": "ade20k"}, "class_weights must be one of cityscapes, got 'ade20k'. Or give a list"),
        ({"loss_mean": "pixel"}, "loss_mean must be one of batch, image, got 'pixel'"),
        ({"ohem_threshold": 0.0}, "ohem_threshold must be a number above 0 and at most 1, or null for all pixels"),
        ({"ohem_min_kept": 0}, "ohem_min_kept must be a whole number at least 1"),
        ({"eval_window": (4, None)}, "eval_window must be a height and a width of at least 1"),
        ({"eval_scales": [1e308]}, r"eval_scales\[0\] must be a number above 0 and at most 10"),
        ({"eval_window": (0, 4)}, "eval_window must be a height and a width of at least 1"),
        ({"eval_stride": (4, 4)}, "eval_stride must be at least 1 and at most eval_window None"),
        ({"eval_window": (4, 4), "eval_stride": (4, 5)}, r"eval_stride must be .* at most eval_window \(4, 4\)"),
        ({"eval_scales": []}, "eval_scales must be a list of numbers above 0"),
        ({"eval_scales": [1.0, 0.0]}, r"eval_scales\[1\] must be a number above 0"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        SegmentationTask(network(), **arguments)


def test_evaluations_by_windows_that_hardly_end_are_refused():
    task = SegmentationTask(network(), eval_window=(1, 2), eval_scales=[0.5, 1.0])
    few = torch.zeros(1, 3, 10, 101)
    task.averaged_logits(few)
    with pytest.raises(ValueError, match=r"^eval_window must be at least 64 pixels .* 10 x 102 has 1010\)"):
        task.averaged_logits(torch.zeros(1, 3, 10, 102))


def test_a_metric_that_is_not_logged_is_told_before_the_first_epoch(tmp_path):
    run = trainer(tmp_path, BestCheckpoint(), enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"monitor must be a metric that .* val/miou.*, got 'val/acc'"):
        run.fit(SegmentationTask(network()), RandomScenes())
    assert run.global_step == 0
    run = trainer(tmp_path, BestCheckpoint("val/miou"), enable_checkpointing=True)
    run.fit(SegmentationTask(network()), RandomScenes())
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()


@pytest.mark.parametrize("scales", [[1.0], [0.5, 2.0]])
def test_large_images_are_predicted_and_evaluated_by_tiles(tmp_path, monkeypatch, scales):
    data, net = RandomScenes(samples=2, size=(32, 48)), network()
    task = SegmentationTask(net, eval_flip=True, eval_scales=scales)
    widths = []
    net.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[-1]))
    run = trainer(tmp_path)
    whole = torch.cat(run.predict(task, data))
    scores = run.test(task, data, verbose=False)
    assert max(widths) == 48 * max(scales)
    widths.clear()
    monkeypatch.setattr("knlightning.tasks.segmentation.LARGEST_WHOLE", 32 * 48 * max(scales) ** 2 - 1)
    monkeypatch.setattr("knlightning.tasks.segmentation.by_tiles", partial(by_tiles, tile=32, margin=8))
    assert torch.equal(torch.cat(run.predict(task, data)), whole)
    assert run.test(task, data, verbose=False) == scores
    assert max(widths) == 32 * max(scales)
