import pickle

import pytest

from knlightning.checks import ArgumentError, check, check_choice, check_number


@pytest.mark.parametrize(
    ("value", "bounds"),
    [
        (1, {"at_least": 1, "integer": True}),
        (0.5, {"above": 0, "below": 1}),
        (1, {"at_most": 1}),
        (-3, {}),
        (None, {"at_least": 1, "none": "the default"}),
    ],
)
def test_numbers_in_range(value, bounds):
    check_number("eps", value, **bounds)


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (0, {"at_least": 1, "integer": True}, "eps must be a whole number at least 1, got 0"),
        (1.5, {"integer": True}, "eps must be a whole number, got 1.5"),
        (0.0, {"above": 0, "below": 1}, "eps must be a number above 0 and below 1, got 0.0"),
        (1, {"at_least": 0, "below": 1}, "eps must be a number at least 0 and below 1, got 1"),
        (2, {"at_most": 1}, "eps must be a number at most 1, got 2"),
        (float("nan"), {}, "eps must be a number, got nan"),
        (float("inf"), {"above": 0}, "eps must be a number above 0, got inf"),
        (None, {"above": 0}, "eps must be a number above 0, got None"),
        (True, {"integer": True}, "eps must be a whole number, got True"),
        ("3", {}, "eps must be a number, got '3'"),
        (0, {"above": 0, "none": "1e-5"}, "eps must be a number above 0, or null for 1e-5, got 0"),
    ],
)
def test_numbers_out_of_range(value, bounds, message):
    with pytest.raises(ArgumentError) as error:
        check_number("eps", value, **bounds)
    assert str(error.value) == message


def test_a_choice_names_all():
    check_choice("norm", "layer", ("batch", "layer"))
    with pytest.raises(ValueError, match=r"^norm must be one of batch, layer, got 'bach'\. Spell it right$"):
        check_choice("norm", "bach", ("batch", "layer"), "Spell it right")


def test_a_condition_and_its_error_through_pickle():
    check(True, "a", 1, "even")
    with pytest.raises(ArgumentError) as error:
        check(False, "a", 1, "even")
    again = pickle.loads(pickle.dumps(error.value))
    assert (again.name, again.value, str(again)) == ("a", 1, "a must be even, got 1")
