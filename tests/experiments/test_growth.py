import pytest

from experiments import growth


def test_the_images_of_a_step_are_those_of_one_device(monkeypatch):
    monkeypatch.setattr(growth, "IMAGES", 1003)
    for devices, left_out in ((1, 0), (4, 3), (16, 11)):
        drawn, seconds, left = growth.orders(devices, 64 // devices)
        assert drawn == growth.orders(1, 64)[0]
        assert (left, seconds > 0) == (left_out, True)
        assert [len(step) for step in drawn] == [64, 64]


def test_time_and_checkpoints_by_hand(monkeypatch, capsys):
    monkeypatch.setattr(growth, "IMAGES", 1003)
    monkeypatch.setattr(growth, "DEVICES", (1, 4, 16))
    monkeypatch.setattr(growth, "bytes_kept", lambda network, images: 80_000_000)
    growth.simulate(batch_size=2, images_per_second=1, read_per_second=3)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:5] for row in rows] == [
        ["1", "2", "502", "1,004", "0%"],
        ["4", "8", "125", "251", "0%"],
        ["16", "32", "31", "62", "0%"],
    ]
    assert [row[8] for row in rows] == ["0", "3", "11"]
    assert [float(row[7]) for row in rows] == pytest.approx([142, 71, 36], abs=1)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="batch_size must be a number above 0, got 0"):
        growth.simulate(batch_size=0)
