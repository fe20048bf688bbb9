import pytest

from knlightning.analysis.privacy_budget import FACTORS, costs_of_noise, draw_costs
from knlightning.privacy.accounting import Phase, epsilon

RUN = Phase(1.0, 0.1, 50)


def test_more_noise_costs_less_epsilon():
    costs = costs_of_noise(RUN, 1e-4, "rdp")
    assert [cost.noise_multiplier for cost in costs] == list(FACTORS)
    assert [cost.epsilon for cost in costs] == sorted((cost.epsilon for cost in costs), reverse=True)
    assert costs[FACTORS.index(1.0)].epsilon == epsilon([RUN], 1e-4, "rdp")


def test_the_picture_shows_all_and_marks_the_run():
    costs = costs_of_noise(RUN, 1e-4, "rdp")
    (axes,) = draw_costs(costs, RUN, 1e-4).axes
    line, mark = axes.lines
    assert line.get_xydata().tolist() == [list(cost) for cost in costs]
    assert mark.get_xydata().tolist() == [[1.0, pytest.approx(epsilon([RUN], 1e-4, "rdp"))]]
