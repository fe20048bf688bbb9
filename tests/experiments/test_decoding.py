import pytest

from experiments.decoding import REFERENCE, measure


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # the dataset of timm leaves its files open
def test_images_are_made_faster_than_by_torchvisions_reference(capsys):
    ratios = measure(images=48, rounds=3)
    assert ratios["knlightning"] > 1.2
    assert ratios[REFERENCE] == 1
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row.split(" | ")[0] for row in rows[2:]] == [f"| {way}" for way in ratios]


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="rounds must be a whole number at least 1, got 0"):
        measure(rounds=0)
