import pytest

from experiments.efficiency import ALONE, measure


@pytest.mark.slow
def test_two_processes_are_compared_with_one(capsys):
    found = measure(batch_size=2, steps=1, rounds=1)
    assert found[ALONE] == 1
    assert all(value > 0 for value in found.values())
    assert capsys.readouterr().out.count("\n| ") == 2 + len(found)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="steps must be a whole number at least 1, got 0"):
        measure(steps=0)
