"""Values of training samples with noise: exact without it, and of no more than the stated sensitivity."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from privacy.private_runs import SAMPLES, privacy, task, trainer
from privacy.test_audit import audited, failed
from standins import RandomData
from torch import nn

from knlightning.privacy.clipping import ClippedSum
from knlightning.privacy.private_metrics import PrivateMetrics


def fit(tmp_path, callback, module=None, data=None, *callbacks):
    module = module or task(lr=0.0)
    run = trainer(tmp_path, callback, *callbacks, max_epochs=1, enable_checkpointing=bool(callbacks))
    run.fit(module, data or RandomData(SAMPLES, SAMPLES))
    return run.callback_metrics, module


@pytest.mark.parametrize("settings", [{}, {"physical_batch_size": 6}, {"views": 2}])
def test_without_noise_they_are_the_true_ones(tmp_path, settings):
    data = RandomData(SAMPLES, SAMPLES)
    data.dataset.tensors[0][3] = float("nan")  # contributes to nothing
    values, module = fit(tmp_path, privacy(noise_multiplier=0.0, private_metrics=True, **settings), data=data)
    images, labels = data.dataset.tensors
    right = (module.backbone(images).argmax(1) == labels) & ~images.isnan().flatten(1).any(1)
    assert values["privacy/train_acc"] == pytest.approx(float(right.double().mean()))
    norms = []
    for image, label in zip(images, labels, strict=True):
        loss = nn.functional.cross_entropy(module.backbone(image[None]), label[None])
        gradient = torch.autograd.grad(loss, list(module.backbone.parameters()))
        norms.append(torch.cat([g.flatten() for g in gradient]).norm())
    clipped = (torch.stack(norms) > 0.7).double().mean()
    assert 0 < clipped < 1
    assert values["privacy/clipped"] == pytest.approx(float(clipped))


def test_a_sample_contributes_no_more_than_the_sensitivity(tmp_path):
    torch.manual_seed(0)
    net, x = nn.Linear(3, 2), 100 * torch.randn(1, 3)
    sums = ClippedSum(net, 2.0, "flat", metrics_share=0.02)
    net(x).sum().backward()
    sums.add(1.0, correct=torch.ones(1))
    total = sums.pop()
    assert sums.sensitivity == pytest.approx(2.0 / 0.98**0.5)
    assert total.norm() == pytest.approx(sums.sensitivity, rel=2e-4)
    assert total[:-2].norm() == pytest.approx(2.0, rel=2e-4)
    assert sums.set_gradients(total).tolist() == pytest.approx([1.0, 1.0])
    assert not sums.pop().any()
    sums.close()


def test_the_audit_holds_them_to_the_same_bound_and_noise(tmp_path, monkeypatch):
    """With 0.02 of the squared bound they get noise of 10 / 0.1 / 20, for a mean over 20 samples."""
    assert failed(audited(tmp_path, privacy(noise_multiplier=2.0, private_metrics=True))) == set()
    values, _ = fit(tmp_path, privacy(noise_multiplier=10.0, private_metrics=True))
    assert abs(values["privacy/train_acc"]) < 5 * 5
    assert values["privacy/train_acc"] != values["privacy/clipped"]
    monkeypatch.setattr(ClippedSum, "sensitivity", 0.7)
    assert "a sample changes a step by no more than the bound" in failed(
        audited(tmp_path, privacy(max_grad_norm=1.0, private_metrics=True))
    )


def test_they_may_be_followed_and_others_are_not_there(tmp_path):
    files = ModelCheckpoint(tmp_path, monitor="privacy/train_acc", filename="{privacy/clipped:.3f}")
    values, _ = fit(tmp_path, privacy(private_metrics=True), None, None, files)
    assert files.best_model_score == values["privacy/train_acc"]
    values, _ = fit(tmp_path, privacy())
    assert "privacy/clipped" not in values


def test_the_accuracy_is_known_where_logits_and_labels_are():
    metrics = PrivateMetrics(None)
    logits, labels = torch.eye(3)[[0, 1, 2, 0]], torch.tensor([0, 1, 0, 0])
    assert metrics.correct([], [labels], 1) is None
    assert metrics.correct([logits], [labels[:3]], 1) is None
    metrics.add(torch.tensor([0.5, 0.25], dtype=torch.float64))
    assert metrics.pop() == {"privacy/clipped": 0.5}
    assert metrics.correct([logits], [labels], 1).tolist() == [1, 1, 0, 1]
    assert metrics.correct([logits], [labels], 2).tolist() == [1, 0.5]
    pixels = metrics.correct(
        [logits[:, :, None, None].expand(-1, -1, 2, 2)], [labels[:, None, None].expand(-1, 2, 2)], 1
    )
    assert pixels.tolist() == [1, 1, 0, 1]
    metrics.add(torch.tensor([0.5, 0.25], dtype=torch.float64))
    metrics.add(torch.tensor([0.5, 0.75], dtype=torch.float64))
    assert metrics.pop() == {"privacy/clipped": 0.5, "privacy/train_acc": 0.5}
    assert metrics.pop() == {}
