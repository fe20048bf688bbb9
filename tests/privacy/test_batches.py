from dataclasses import dataclass

import pytest
import torch

from knlightning.privacy.batches import count_samples, images_of, join_batches, loss_of, map_tensors, split_batch

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


@dataclass
class Named:
    images: torch.Tensor
    names: list
    scale: float = 1.0


@pytest.mark.parametrize(
    "batch",
    [
        IMAGES,
        [IMAGES, LABELS],
        (IMAGES, {"labels": LABELS, "paths": ["a", "b", "c", "d"]}),
        {"x": IMAGES, "y": ("a", "b", "c", "d"), "z": 3},
        Named(IMAGES, ["a", "b", "c", "d"]),
    ],
)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_batches_are_what_their_samples_join_to(batch, count):
    parts = split_batch(batch, count)
    assert [len(images_of(part)) for part in parts] == [4 // count] * count
    joined = join_batches(parts)
    assert type(joined) is type(batch)
    assert str(joined) == str(batch)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([torch.zeros(1, 2), torch.zeros(1, 3)], r"tensors of the shapes \(1, 2\), \(1, 3\)"),
        ([torch.zeros(()), torch.zeros(())], r"tensors of the shapes \(\)"),
        ([(IMAGES, 0.5), (IMAGES, 0.25)], "values 0.5 that differ"),
        ([(IMAGES,), [IMAGES]], "different types"),
        ([(IMAGES,), (IMAGES, IMAGES)], "different lengths"),
    ],
)
def test_what_does_not_join_is_refused(parts, message):
    with pytest.raises(ValueError, match=f"here they do not join: .*{message}"):
        join_batches(parts)


def test_what_has_no_rows_for_samples_cannot_be_divided():
    with pytest.raises(ValueError, match=r"a tensor of the shape \(3,\) in a batch of 4 images"):
        split_batch((IMAGES, torch.zeros(3)), 2)
