"""Scores of the classes, from a confusion matrix."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MOST_PAIRS = 20
"""Most pairs of classes that are named."""


class ClassScores(NamedTuple):
    """Scores of each class (classes,), in [0, 1]; NaN where they are not defined.

    Attributes:
        precision: Share of what is predicted as the class that is right; NaN if nothing is.
        recall: Share of the class that is found; NaN if there is nothing of it.
        f1: Harmonic mean of the two; NaN if the class is neither true nor predicted.
        iou: Intersection over union, likewise.
        support: Number of images or pixels of the class, int64.
    """

    precision: Tensor
    recall: Tensor
    f1: Tensor
    iou: Tensor
    support: Tensor


def scores_of_classes(confusion: Tensor) -> ClassScores:
    """Compute the scores of each class.

    Args:
        confusion: Number of images or pixels (classes, classes) by true class (rows) and predicted class (columns).
    """
    exact = confusion.double()
    hits, true, predicted = exact.diagonal(), exact.sum(dim=1), exact.sum(dim=0)
    union = true + predicted - hits
    return ClassScores(hits / predicted, hits / true, 2 * hits / (true + predicted), hits / union, confusion.sum(dim=1))


def confused_pairs(confusion: Tensor, names: Sequence[str]) -> list[tuple[str, str, int, float]]:
    """List which classes are taken for which others most often.

    Returns:
        True class, predicted class, number and share of the true class; the largest numbers first.
    """
    wrong = confusion.clone().fill_diagonal_(0)
    values, places = wrong.flatten().topk(min(MOST_PAIRS, wrong.numel()))
    support = confusion.sum(dim=1)
    rows, columns = torch.unravel_index(places, wrong.shape)
    found = zip(values.tolist(), rows.tolist(), columns.tolist(), strict=True)
    return [(names[row], names[column], n, n / int(support[row])) for n, row, column in found if n > 0]
