import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score, precision_recall_fscore_support

from knlightning.callbacks.scores import confused_pairs, scores_of_classes


def test_scores_are_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    true, predicted = generator.integers(0, 4, 300), generator.integers(0, 4, 300)
    scores = scores_of_classes(torch.from_numpy(confusion_matrix(true, predicted)))
    precision, recall, f1, support = precision_recall_fscore_support(true, predicted)
    assert scores.precision.numpy() == pytest.approx(precision)
    assert scores.recall.numpy() == pytest.approx(recall)
    assert scores.f1.numpy() == pytest.approx(f1)
    assert scores.iou.numpy() == pytest.approx(jaccard_score(true, predicted, average=None))
    assert scores.support.tolist() == support.tolist()


def test_what_is_not_defined_is_not_a_number():
    scores = scores_of_classes(torch.tensor([[2, 0, 0], [1, 0, 0], [0, 0, 0]]))
    assert scores.precision.isnan().tolist() == [False, True, True]
    assert scores.recall.isnan().tolist() == [False, False, True]
    assert scores.f1.isnan().tolist() == [False, False, True]


def test_pairs_that_are_confused_most_come_first():
    confusion = torch.tensor([[9, 1, 0], [0, 5, 5], [0, 0, 7]])
    assert confused_pairs(confusion, ["a", "b", "c"]) == [("b", "c", 5, 0.5), ("a", "b", 1, 0.1)]
