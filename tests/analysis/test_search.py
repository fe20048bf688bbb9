import statistics
from pathlib import Path

import pytest

from knlightning.analysis.search import Search, Trial, draw_learning_rates, mean_and_sd, search


def scripted(accuracies):
    """A training that reaches the given accuracies in turn, None for one that diverges; and what it was asked for."""
    asked = []
    given = iter(accuracies)

    def train(learning_rate, seed):
        asked.append((learning_rate, seed))
        accuracy = next(given)
        value = accuracy or 0.0
        return Trial(learning_rate, seed, value, value / 2, accuracy is None, Path())

    return train, asked


def never(trial):
    return 0.0


@pytest.mark.parametrize(
    ("accuracies", "best", "note"),
    [
        ([0.5, 0.6, 0.7, 0.6], 0.05, None),
        ([0.9, 0.8], 0.2, "higher start"),
        ([0.1, 0.1, 0.8, 0.8, 0.7], 0.05, None),  # equally good: the highest
        ([None, None, 0.6, 0.7, 0.5], 0.025, None),
        ([0.6, 0.7, None], 0.1, None),
        ([0.3, 0.4, 0.5, 0.6, 0.7, 0.8], 0.00625, "not passed in 5 halvings"),
        ([None] * 6, 0.2, "more than guessing"),
    ],
)
def test_the_learning_rate_is_halved_until_the_best_is_passed(accuracies, best, note):
    train, asked = scripted(accuracies)
    found = search(train, never, start=0.2, seeds=1, max_halvings=5)
    assert asked == [(0.2 / 2**k, 0) for k in range(len(accuracies))]
    assert found.learning_rate == best
    assert [trial.val for trial in found.trials] == [accuracy or 0.0 for accuracy in accuracies]
    assert [trial.diverged for trial in found.trials] == [accuracy is None for accuracy in accuracies]
    text = " ".join(found.notes)
    assert (note in text) if note else ("diverged" in text or not text)


def test_patience_looks_beyond_a_single_worse_learning_rate():
    train, asked = scripted([0.5, 0.4, 0.6, 0.5, 0.55])
    assert search(train, never, start=0.2, seeds=1, patience=2).learning_rate == 0.05
    assert len(asked) == 5


def test_a_learning_rate_that_only_guesses_is_not_passed():
    train, _ = scripted([0.22, 0.1, 0.1, 0.9, 0.8])
    assert search(train, lambda trial: 0.25, start=0.2, seeds=1).learning_rate == 0.025


def test_the_best_learning_rate_is_repeated_with_further_seeds():
    train, asked = scripted([0.5, 0.6, 0.4, 0.7, None])
    found = search(train, never, start=0.2, seeds=3)
    assert asked[3:] == [(0.1, 1), (0.1, 2)]
    assert [(trial.seed, trial.test) for trial in found.repeats] == [(0, 0.3), (1, 0.35), (2, 0.0)]
    assert found.accuracy == f"{65 / 3:.2f} ± {statistics.stdev([30, 35, 0]):.2f}"
    assert found.notes == ["1 of the 3 runs with the best learning rate diverged and count as accuracy 0."]


def test_learning_rates_tried_ahead_change_nothing_but_what_was_tried():
    train, asked = scripted([0.5, 0.6, 0.4, 0.9, 0.7])
    found = search(train, never, start=0.2, seeds=2, ahead=2)
    assert asked == [(0.2, 0), (0.1, 0), (0.05, 0), (0.025, 0), (0.1, 1)]  # 0.025 is beyond the end of the search
    assert found.learning_rate == 0.1
    assert [trial.val for trial in found.trials] == [0.5, 0.6, 0.4, 0.9, 0.7]
    train, asked = scripted([0.5, 0.6])
    search(train, never, start=0.2, seeds=1, max_halvings=1, ahead=4)
    assert asked == [(0.2, 0), (0.1, 0)]


def test_no_search():
    train, asked = scripted([0.5, 0.6])
    found = search(train, never, start=0.2, seeds=2, max_halvings=0)
    assert asked == [(0.2, 0), (0.2, 1)]
    assert found.accuracy == mean_and_sd([25, 30]) == "27.50 ± 3.54"
    assert not found.notes


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seeds": 0}, "seeds must be a whole number at least 1, got 0"),
        ({"patience": 0}, "patience must be a whole number at least 1, got 0"),
        ({"max_halvings": -1}, "max_halvings must be a whole number at least 0, got -1"),
        ({"start": 0.0}, "start must be a number above 0, got 0.0"),
    ],
)
def test_wrong_arguments(changed, message):
    with pytest.raises(ValueError, match=message):
        search(None, never, **({"start": 0.2, "seeds": 1} | changed))


def test_plot_shows_all_learning_rates_and_the_spread_of_the_best():
    trials = [
        Trial(0.2, 0, 0.0, 0.0, True, Path("a")),
        Trial(0.1, 0, 0.8, 0.7, False, Path("b")),
        Trial(0.05, 0, 0.6, 0.5, False, Path("c")),
        Trial(0.1, 1, 0.6, 0.9, False, Path("d")),
    ]
    figure = draw_learning_rates(Search(trials, 0.1, []))
    (axes,) = figure.axes
    validation, test = axes.lines[:2]
    assert validation.get_xydata().tolist() == [[0.05, 60], [0.1, 80], [0.2, 0]]
    assert test.get_xydata().tolist() == [[0.05, 50], [0.1, 70], [0.2, 0]]
    assert axes.containers[0].lines[0].get_xydata().tolist() == [[0.1, 80]]
    assert [text.get_text() for text in axes.texts] == ["diverged"]
