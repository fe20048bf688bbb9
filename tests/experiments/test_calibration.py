import pytest

from experiments.calibration import main, preactivated, resnet
from knlightning.models import kernel_normalize


@pytest.mark.parametrize("make", [resnet, preactivated])
def test_networks_are_converted_whole(make):
    _, report = kernel_normalize(make())
    assert len(report.convolutions) in (8, 9)


@pytest.mark.slow
def test_calibrated_network_keeps_more(capsys):
    main(seeds=1, pretraining=1, epochs=1)
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    before = {(row[1].strip(), row[3].strip()): float(row[4]) for row in rows}
    for network in ("resnet", "preactivated"):
        assert before[network, "calibrated"] > before[network, "converted"]
