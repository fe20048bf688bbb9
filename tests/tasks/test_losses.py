import math

import pytest
import torch
from torch.nn import functional as F

from knlightning.tasks.losses import IGNORED, mean_of_pixels, quotient


def batch(images=3, classes=4, size=(5, 6), ignored=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, classes, *size, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (images, *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = IGNORED
    return logits.requires_grad_(), labels


def loss(logits, labels, *args, **kwargs):
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    return quotient(*mean_of_pixels(losses, labels, *args, **kwargs))


WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.25], dtype=torch.float64)


def naive(logits, labels, weights=None, threshold=None, least=1):
    """The weighted mean over the pixels that are kept, one by one."""
    pixels = []
    for image in range(len(labels)):
        for row in range(labels.shape[1]):
            for column in range(labels.shape[2]):
                label = int(labels[image, row, column])
                if label != IGNORED:
                    exponentials = logits.detach()[image, :, row, column].exp()
                    probability = float(exponentials[label] / exponentials.sum())
                    pixels.append((probability, 1.0 if weights is None else float(weights[label])))
    if threshold is not None:
        pixels.sort()
        kept = max(least, sum(probability < threshold for probability, _ in pixels))
        pixels = pixels[:kept]
    total = sum(weight for _, weight in pixels)
    return sum(-weight * math.log(probability) for probability, weight in pixels) / total if total else 0.0


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_mean_of_the_batch_is_that_of_torch(weights):
    logits, labels = batch()
    ours = loss(logits, labels, weights)
    theirs = F.cross_entropy(logits, labels, weights, ignore_index=IGNORED)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits) for value in (ours, theirs)))
    assert ours.item() == pytest.approx(naive(logits, labels, weights))


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_mean_of_images(weights):
    logits, labels = batch()
    labels[1] = IGNORED  # counts 0
    expected = sum(naive(logits[i : i + 1], labels[i : i + 1], weights) for i in range(3)) / 3
    assert loss(logits, labels, weights, "image").item() == pytest.approx(expected)
    assert expected != pytest.approx(naive(logits, labels, weights))  # else the test could not fail


@pytest.mark.parametrize("mining", [{}, {"ohem_threshold": 0.5, "ohem_min_kept": 4}])
def test_no_image_changes_the_gradient_of_another(mining):
    logits, labels = batch()
    gradients = []
    for others in (labels[1:], torch.full_like(labels[1:], IGNORED)):
        value = loss(logits, torch.cat([labels[:1], others]), WEIGHTS, "image", **mining)
        gradients.append(torch.autograd.grad(value, logits)[0][0])
    assert torch.equal(*gradients)
    assert gradients[0].any()


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize(("threshold", "least"), [(0.7, 1), (0.2, 20), (0.01, 1000), (1.0, 1)])
def test_hard_pixels(threshold, least, weights):
    logits, labels = batch()
    ours = loss(logits, labels, weights, "batch", threshold, least)
    assert ours.item() == pytest.approx(naive(logits, labels, weights, threshold, least))
    ours = loss(logits, labels, weights, "image", threshold, least)
    expected = [naive(logits[i : i + 1], labels[i : i + 1], weights, threshold, least) for i in range(3)]
    assert ours.item() == pytest.approx(sum(expected) / 3)


def test_hard_pixels_alone_have_a_gradient():
    logits, labels = batch()
    (gradient,) = torch.autograd.grad(loss(logits, labels, ohem_threshold=0.3, ohem_min_kept=1), logits)
    probabilities = logits.softmax(dim=1).gather(1, labels.where(labels != IGNORED, 0)[:, None])[:, 0]
    hard = (labels != IGNORED) & (probabilities < 0.3)
    assert 0 < hard.sum() < (labels != IGNORED).sum()
    assert torch.equal(gradient.abs().sum(dim=1) > 0, hard)


@pytest.mark.parametrize("threshold", [None, 0.9])
@pytest.mark.parametrize("mean", ["batch", "image"])
def test_nothing_labelled_is_a_loss_of_zero(mean, threshold):
    logits, labels = batch(ignored=2)
    assert (labels == IGNORED).all()
    value = loss(logits, labels, WEIGHTS, mean, threshold)
    assert value.item() == 0
    assert not torch.autograd.grad(value, logits)[0].any()
