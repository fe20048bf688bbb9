import math
from functools import partial

import pytest
import standins
import torch
from standins import RandomData, TinyNet
from torch import nn
from torch.nn import functional as F

from knlightning.tasks import ClassificationTask

trainer = partial(standins.trainer, max_epochs=1)


class Table(nn.Module):
    """Logits that depend on the image in a known way, with one parameter to train."""

    def __init__(self, classes):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.classes = classes

    def forward(self, images):
        return self.scale * images.flatten(1)[:, : self.classes]


@pytest.mark.parametrize(("classes", "stage"), [(3, "val"), (3, "test"), (7, "val"), (7, "test")])
def test_metrics_are_means_over_images_with_a_short_last_batch(tmp_path, classes, stage):
    data, network = RandomData(samples=10, batch_size=4, classes=classes), Table(classes)
    task = ClassificationTask(network, label_smoothing=0.3)
    run = trainer(tmp_path)
    (run.validate if stage == "val" else run.test)(task, data, verbose=False)
    images, labels = data.dataset.tensors
    logits = network(images)
    order = logits.argsort(dim=1, descending=True)
    expected = {"loss": F.cross_entropy(logits, labels), "acc": (order[:, 0] == labels).double().mean()}
    if classes >= 5:
        expected["acc_top5"] = (order[:, :5] == labels[:, None]).any(dim=1).double().mean()
    assert run.callback_metrics == {f"{stage}/{name}": pytest.approx(value.item()) for name, value in expected.items()}
    mean_of_batches = torch.stack([F.cross_entropy(*b) for b in zip(logits.split(4), labels.split(4), strict=True)])
    assert expected["loss"].item() != pytest.approx(mean_of_batches.mean().item())  # else the test could not fail


def test_training_metrics_are_means_over_images(tmp_path):
    data, network = RandomData(), Table(3)
    task = ClassificationTask(network, 0.3, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    run = trainer(tmp_path)
    run.fit(task, data)
    images, labels = data.dataset.tensors
    expected = F.cross_entropy(network(images), labels, label_smoothing=0.3)
    assert run.callback_metrics["train/loss"].item() == pytest.approx(expected.item())
    hits = network(images).argmax(dim=1) == labels
    assert run.callback_metrics["train/acc"].item() == pytest.approx(hits.double().mean().item())


def test_not_finite_loss_stops_the_run(tmp_path):
    data = RandomData()
    data.dataset.tensors[0][5] = float("nan")  # in the second batch
    run = trainer(tmp_path, num_sanity_val_steps=0)
    with pytest.raises(FloatingPointError, match=r"loss is nan at epoch 0, batch 1 .*learning rate"):
        run.fit(ClassificationTask(TinyNet(3)), data)
    assert run.global_step == 1


@pytest.mark.parametrize("sanity", [0, 2])
def test_width_is_compared_with_the_data_before_the_first_step(tmp_path, sanity):
    data = RandomData()
    data.num_classes = 3
    run = trainer(tmp_path, num_sanity_val_steps=sanity)
    with pytest.raises(ValueError, match=r"10 outputs .* 3 classes: set the backbone's num_classes to 3"):
        run.fit(ClassificationTask(TinyNet(10)), data)
    assert run.global_step == 0


def test_network_that_gives_more_than_logits(tmp_path):
    network = TinyNet(3)
    network.register_forward_hook(lambda module, inputs, output: (output, output))
    with pytest.raises(ValueError, match="the network gives a tuple, and not logits alone; with aux_logits of false"):
        trainer(tmp_path).fit(ClassificationTask(network), RandomData())


def test_loaders_without_datamodule(tmp_path):
    data = RandomData()
    run = trainer(tmp_path)
    run.fit(ClassificationTask(TinyNet(3)), data.train_dataloader(), data.val_dataloader())
    assert 0 <= run.callback_metrics["val/acc"] <= 1


def test_predict_step_gives_probabilities():
    task = ClassificationTask(TinyNet(3)).eval()
    images = torch.rand(2, 3, 8, 8)
    probabilities = task.predict_step((images, ["a", "b"]), 0)
    torch.testing.assert_close(probabilities, task(images).softmax(dim=1))


def test_channels_last():
    seen = []

    class Spy(nn.Conv2d):
        def forward(self, images):
            seen.append((images, self.weight))
            return super().forward(images)

    network = nn.Sequential(Spy(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    ClassificationTask(network, channels_last=True)(torch.rand(2, 3, 8, 8))
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in seen[0])


def test_checkpoint_needs_no_code_to_load(tmp_path):
    run = trainer(tmp_path)
    task = ClassificationTask(TinyNet(3), 0.1, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    run.fit(task, RandomData())
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert stored["hyper_parameters"]["label_smoothing"] == 0.1
    loaded = ClassificationTask.load_from_checkpoint(tmp_path / "a.ckpt", backbone=TinyNet(3))
    assert loaded.label_smoothing == 0.1
    assert torch.equal(loaded.backbone.head.weight, task.backbone.head.weight)


# mixup and cutmix


def mixed(tmp_path, batches=1, **settings):
    """Train on one batch after the other; return what the network was given and the mean of the logged loss."""
    seen = []

    class Spy(Table):
        def forward(self, images):
            if self.training:
                seen.append(images.detach().clone())
            return super().forward(images)

    network = Spy(3)
    task = ClassificationTask(network, optimizer=lambda params: torch.optim.SGD(params, lr=0.0), **settings)
    run = trainer(tmp_path, num_sanity_val_steps=0, limit_val_batches=0, max_epochs=batches)
    run.fit(task, RandomData(samples=6, batch_size=6))
    return seen, network, run


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_labels_are_mixed_as_the_images(tmp_path, kind, smoothing):
    """The share of each image in a mixed one is read off the pixels; the loss is then that of both labels."""
    torch.manual_seed(1)
    (given,), network, run = mixed(tmp_path, label_smoothing=smoothing, **{f"{kind}_alpha": 1.0})
    images, labels = RandomData(samples=6, batch_size=6).dataset.tensors
    neighbours = images.roll(1, 0)
    if kind == "mixup":
        share = ((given - neighbours) / (images - neighbours)).double().median().item()
        torch.testing.assert_close(given, share * images + (1 - share) * neighbours)
    else:
        own = (given == images).all(dim=1)
        assert torch.equal(given, torch.where(own[:, None], images, neighbours))
        rows, columns = (~own[0]).nonzero().T
        area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert area == (~own[0]).sum()  # a rectangle
        share = own.double().mean().item()
    assert 0.05 < share < 0.95  # else little would be mixed
    logits = network(given).double()
    losses = [F.cross_entropy(logits, target, label_smoothing=smoothing) for target in (labels, labels.roll(1))]
    expected = share * losses[0] + (1 - share) * losses[1]
    assert run.callback_metrics["train/loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    heavier = labels if share > 0.5 else labels.roll(1)
    hits = (logits.argmax(dim=1) == heavier).double().mean()
    assert run.callback_metrics["train/acc"].item() == pytest.approx(hits.item())


def test_with_both_each_batch_gets_one(tmp_path):
    torch.manual_seed(0)
    seen, _, _ = mixed(tmp_path, batches=40, mixup_alpha=1.0, cutmix_alpha=1.0)
    images = RandomData(samples=6, batch_size=6).dataset.tensors[0]
    neighbours = images.roll(1, 0)
    cut = sum(bool(((given == images) | (given == neighbours)).all()) for given in seen)
    assert 8 <= cut <= 32  # of 40; beyond by chance once in 10,000 times


def test_evaluation_is_not_mixed(tmp_path):
    data, network = RandomData(), Table(3)
    run = trainer(tmp_path)
    run.validate(ClassificationTask(network, mixup_alpha=1.0, cutmix_alpha=1.0), data, verbose=False)
    images, labels = data.dataset.tensors
    assert run.callback_metrics["val/loss"].item() == pytest.approx(F.cross_entropy(network(images), labels).item())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_mixed_labels_in_other_precisions(tmp_path, precision):
    class Checked(ClassificationTask):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert outputs["loss"].isfinite()

    run = trainer(tmp_path, precision=precision, accumulate_grad_batches=2)
    run.fit(Checked(TinyNet(3), label_smoothing=0.1, mixup_alpha=0.2, cutmix_alpha=1.0), RandomData())
    assert run.global_step == 2


DECAY = "a number at least 0 and .*, or null for the optimizer's, got -0.1"
OUT_OF_RANGE = [
    *((f"{kind}_weight_decay", -0.1, DECAY) for kind in ("norm", "bias")),
    ("layer_decay", 0.0, "a number above 0 and at most 1, got 0.0"),
    *(("lr_scheduler_interval", value, "one of epoch, step, got ") for value in (None, "batch", 1)),
    *(("label_smoothing", value, "a number at least 0 and at most 1, got") for value in (-0.1, 1.1)),
    *(
        (f"{kind}_alpha", value, "a number at least 0 and at most 1000, got")
        for kind in ("mixup", "cutmix")
        for value in (-0.1, 1e308, math.inf, math.nan, None)
    ),
    ("focal_gamma", -1.0, "a number at least 0"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), OUT_OF_RANGE)
def test_arguments_out_of_range(name, value, allowed):
    with pytest.raises(ValueError, match=f"^{name} must be {allowed}"):
        ClassificationTask(TinyNet(3), **{name: value})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 3, 2]), r"the label 3, and the network has 3 classes: labels must be 0 to 2"),
        (torch.tensor([0, -1, 1, 2]), r"the label -1, and the network has 3 classes"),
        (torch.tensor([0.0, 1.0, 1.0, 2.0]), r"labels must be whole numbers, one for each of the 4 images .*float32"),
        (torch.tensor([[0], [1], [1], [2]]), r"labels must be whole numbers, .* of the shape \(4, 1\)"),
    ],
)
@pytest.mark.parametrize("mixup_alpha", [0.0, 0.2])
def test_labels_that_do_not_fit_the_network_are_named(tmp_path, labels, message, mixup_alpha):
    data = RandomData(samples=4)
    data.dataset = torch.utils.data.TensorDataset(data.dataset.tensors[0], labels)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, num_sanity_val_steps=0).fit(ClassificationTask(TinyNet(3), mixup_alpha=mixup_alpha), data)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).validate(ClassificationTask(TinyNet(3)), data, verbose=False)


def test_class_weights_and_focal_loss_are_of_training_alone(tmp_path):
    data, network = RandomData(samples=8, batch_size=8), Table(3)
    still = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.0)}
    run = trainer(tmp_path)
    run.fit(ClassificationTask(network, class_weights=[1.0, 0.0, 3.0], focal_gamma=2.0, **still), data)
    images, labels = data.dataset.tensors
    true = network(images).softmax(dim=1)[range(8), labels]
    expected = (torch.tensor([1.0, 0.0, 3.0])[labels] * (1 - true) ** 2 * -true.log()).mean()
    assert run.callback_metrics["train/loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    plain = F.cross_entropy(network(images), labels)
    assert run.callback_metrics["val/loss"].item() == pytest.approx(plain.item(), rel=1e-5)


def test_focal_loss_of_mixed_images_and_of_certain_ones():
    task = ClassificationTask(TinyNet(3), class_weights=[1.0, 2.0, 3.0], focal_gamma=0.5)
    logits = torch.tensor([[0.0, 1.0, 2.0], [200.0, 0.0, 0.0]], requires_grad=True)
    shares = torch.tensor([[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]])
    loss = task._loss(logits, shares.argmax(dim=1), shares)
    probabilities = logits[0].softmax(dim=0)
    by_class = torch.tensor([1.0, 2.0, 3.0]) * shares[0] * -probabilities.log()
    expected = by_class.sum() * (1 - (probabilities * shares[0]).sum()) ** 0.5 / 2
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert logits.grad.isfinite().all()


def test_class_weights_that_do_not_fit():
    task = ClassificationTask(TinyNet(3), class_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="class_weights must be one weight for each of the 3 classes, got '2 weights'"):
        task._loss(torch.zeros(1, 3), torch.tensor([0]), None)
    with pytest.raises(ValueError, match=r"class_weights\[1\] must be a number at least 0"):
        ClassificationTask(TinyNet(3), class_weights=[1.0, -2.0])


def test_mirrored_images_count_in_evaluation_alone():
    network = Table(3)
    task = ClassificationTask(network, eval_flip=True)
    images = torch.rand(2, 3, 4, 4)
    expected = (network(images) + network(images.flip(-1))) / 2
    torch.testing.assert_close(task.predict_step((images, []), 0), expected.softmax(dim=1))
    assert not torch.equal(network(images), expected)
