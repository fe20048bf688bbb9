import torch
from torch import nn

from knlightning.privacy.made_up import random_images, trial_pair

IMAGES, LABELS = torch.zeros(4, 3, 2, 2), torch.tensor([0, 1, 1, 2])
MASKS = torch.arange(4, dtype=torch.uint8)[:, None, None].expand(4, 2, 4)


def pairs(batch, num_classes=5, task=None):
    for number in range(12):
        yield number, *trial_pair(batch, number, num_classes, task or nn.Identity())


def test_pixels_are_random_and_labels_as_they_are():
    images, labels = random_images((IMAGES, LABELS))
    assert torch.equal(labels, LABELS)
    assert 0 < images.min() < images.max() < 1
    assert torch.equal(images, random_images((IMAGES, LABELS))[0])


def test_pairs_differ_in_the_first_sample_alone():
    for labels in (LABELS, MASKS):
        for number, (one, two), _ in pairs((IMAGES, labels)):
            for first, second in zip(one, two, strict=True):
                assert torch.equal(first[1:], second[1:])
                assert not torch.equal(first[0], second[0])
                assert first.dtype == second.dtype
            if number == 0:
                assert torch.equal(one[1], labels) or labels is MASKS
    assert torch.equal(LABELS, torch.tensor([0, 1, 1, 2]))  # the batch is left as it is


def test_labels_are_of_all_kinds():
    seen, ignored_ones, equal, partly = set(), set(), False, False
    for _, (one, two), ignored in pairs((IMAGES, LABELS)):
        seen |= {int(one[1][0]), int(two[1][0])}
        ignored_ones.add(ignored)
        equal = equal or len(set(one[1].tolist())) == 1
        assert ignored is None or ignored in two[1]
    assert seen == {0, 1, 2, 3, 4, -100, 255}
    assert ignored_ones == {None, -100, 255}
    assert equal
    for _, (_, two), ignored in pairs((IMAGES, MASKS.long())):
        partly = partly or (ignored is not None and 0 < (two[1][0] == ignored).float().mean() < 1)
    assert partly


def test_the_label_that_a_loss_names_is_tried():
    loss = nn.CrossEntropyLoss(ignore_index=7)
    assert 7 in {ignored for _, _, ignored in pairs((IMAGES, LABELS), task=loss)}
