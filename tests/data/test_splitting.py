import pytest
import torch

from knlightning.data.datasets import TensorImages
from knlightning.data.splitting import stratified_split

LABELS = torch.arange(60) % 3
IMAGES = TensorImages(torch.arange(60).view(60, 1, 1, 1), LABELS)


def test_subsets_are_disjoint_in_order_and_have_the_same_share_of_each_class():
    train, held_out = stratified_split(IMAGES, 0.25, 0)
    assert torch.cat([train.rows, held_out.rows]).sort().values.tolist() == list(range(60))
    for subset, count in ((train, 15), (held_out, 5)):
        assert subset.rows.tolist() == sorted(subset.rows.tolist())
        assert torch.equal(subset.labels, LABELS[subset.rows])
        assert subset.labels.bincount().tolist() == [count] * 3


def test_the_split_follows_its_seed_alone():
    torch.manual_seed(5)
    first, again, other = (stratified_split(IMAGES, 0.25, seed)[1].rows.tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_a_split_that_cannot_be_made_is_named():
    allowed = "a fraction by which the 60 training images can be split"
    with pytest.raises(ValueError, match=rf"^val_split must be {allowed}, got 0\.01\. "):
        stratified_split(IMAGES, 0.01, 0)
