import numpy as np
import pytest

from knlightning.analysis.landscape_plots import HIGHEST_LOSS, draw_contours, draw_lines, draw_surfaces

OFFSETS = [-1.0, 0.0, 1.0]
FLAT, SHARP = np.array([[1.0, 0.5, 1.0]] * 3), np.array([[90.0, 2.0, 90.0], [2.0, 0.05, 2.0], [90.0, 2.0, 90.0]])


def test_all_networks_share_one_scale(tmp_path):
    figure = draw_contours({"group": FLAT, "batch": SHARP}, OFFSETS)
    first, second = (axes.collections[0] for axes in figure.axes[:2])
    assert first.norm is second.norm
    assert np.array_equal(first.levels, second.levels)
    assert (first.norm.vmin, first.norm.vmax) == (0.05, HIGHEST_LOSS)
    figure.savefig(tmp_path / "contours.png")
    surfaces = draw_surfaces({"group": FLAT, "batch": SHARP}, OFFSETS)
    limits = [axes.get_zlim() for axes in surfaces.axes]
    assert limits[0] == limits[1] == pytest.approx((np.log10(0.05), 1))
    surfaces.savefig(tmp_path / "surfaces.png")


def test_lines_go_through_the_middle():
    one = np.full((3, 3), np.nan)
    one[1] = FLAT[1]
    (axes,) = draw_lines({"group": SHARP, "batch": one}, OFFSETS).axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[2, 0.05, 2], [2, 0.05, 2], [1, 0.5, 1]]
    assert len(axes.get_legend().get_texts()) == 2
