from dataclasses import dataclass

import pytest
import torch

from knlightning.privacy.batches import count_samples, images_of, loss_of, map_tensors

IMAGES, LABELS = torch.rand(4, 3), torch.arange(4)


@dataclass
class Batch:
    images: torch.Tensor
    labels: torch.Tensor
    name: str = "a"


@pytest.mark.parametrize(
    "batch", [IMAGES, (IMAGES, LABELS), [IMAGES, {"labels": LABELS}], {"x": IMAGES, "y": 3}, Batch(IMAGES, LABELS)]
)
def test_tensors_in_any_structure(batch):
    assert images_of(batch) is IMAGES
    half = map_tensors(batch, lambda part: part[:2])
    assert type(half) is type(batch)
    assert torch.equal(images_of(half), IMAGES[:2])
    assert count_samples(batch, 1) == 4
    assert count_samples(half, 2) == 1


@dataclass(frozen=True)
class Frozen:
    images: torch.Tensor


def test_a_frozen_dataclass_is_refused_and_not_left_as_it_is():
    with pytest.raises(ValueError, match="frozen dataclass"):
        map_tensors(Frozen(IMAGES), lambda part: part[:2])


def test_what_cannot_be_counted():
    with pytest.raises(RuntimeError, match="4 images came, and each sample has 3 views"):
        count_samples((IMAGES, LABELS), 3)
    with pytest.raises(ValueError, match="must hold tensors, the images first"):
        images_of(["a"])


def test_losses():
    loss = torch.zeros(())
    assert loss_of(loss) is loss
    assert loss_of({"loss": loss, "logits": IMAGES}) is loss
    with pytest.raises(ValueError, match="training_step returned None"):
        loss_of(None)
