import pytest
import torch

from knlightning.privacy.loss import Loss, labels_of


def test_labels_are_the_whole_numbers_behind_the_images():
    images, labels, flags = torch.zeros(3, 2, dtype=torch.uint8), torch.arange(3), torch.ones(3, dtype=torch.bool)
    assert labels_of((images, {"labels": labels, "weights": torch.rand(3), "flags": flags})) == [labels]
    assert labels_of([torch.rand(3), labels]) == [labels]


def test_a_label_that_the_loss_leaves_out_of_its_mean_is_refused():
    batch = (torch.rand(3, 2), torch.tensor([1, -100, 2]))
    Loss().check_labels(batch)
    Loss(ignored_labels=frozenset({255})).check_labels(batch)
    with pytest.raises(ValueError, match=r"the label -100, which the loss leaves out of its mean"):
        Loss(ignored_labels=frozenset({255, -100})).check_labels(batch)
