import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from knlightning.callbacks.calibration import Reliability, expected_calibration_error, reliability_figure


def predictions(count=500):
    generator = torch.Generator().manual_seed(0)
    probabilities = (3 * torch.randn(count, 4, generator=generator)).softmax(dim=1)
    return probabilities, torch.randint(4, (count,), generator=generator)


def test_error_is_that_of_torchmetrics_however_the_predictions_are_batched():
    probabilities, labels = predictions()
    reliability = Reliability()
    for part, of_part in zip(probabilities.split(70), labels.split(70), strict=True):
        top = part.max(dim=1)
        reliability.update(top.values, top.indices == of_part)
    expected = MulticlassCalibrationError(4, n_bins=15)(probabilities, labels)
    assert expected_calibration_error(*reliability.compute()) == pytest.approx(float(expected), abs=1e-6)


def test_certain_predictions_are_in_the_last_bin():
    reliability = Reliability()
    reliability.update(torch.tensor([1.0, 1.0]), torch.tensor([True, False]))
    counts, accuracy, probability = reliability.compute()
    assert counts.tolist() == [0] * 14 + [2]
    assert (accuracy[-1], probability[-1]) == (0.5, 1)
    assert expected_calibration_error(counts, accuracy, probability) == 0.5


def test_there_may_be_more_predictions_than_float32_counts():
    reliability = Reliability()
    reliability.update(torch.ones(1), torch.tensor([True]))
    for name in ("counts", "hits", "probabilities"):
        setattr(reliability, name, getattr(reliability, name) * 2**25)
    for precision in (torch.float32, torch.float64):  # the probabilities of pixels have that of the trainer
        reliability.update(torch.full((2**20,), 0.96875, dtype=precision), torch.ones(2**20, dtype=torch.bool))
    expected = (2**25 + 2**21 * 0.96875) / (2**25 + 2**21)
    assert reliability.compute()[2][-1] == pytest.approx(expected, rel=1e-6)


def test_diagram_shows_accuracy_and_share():
    counts, accuracy = torch.zeros(15), torch.full((15,), torch.nan)
    counts[3], counts[14], accuracy[3], accuracy[14] = 1, 3, 0.5, 1.0
    upper, lower = reliability_figure(counts, accuracy, accuracy).axes
    assert [bar.get_height() for bar in upper.patches if bar.get_height()] == [0.5, 1]
    assert [bar.get_height() for bar in lower.patches if bar.get_height()] == [0.25, 0.75]
