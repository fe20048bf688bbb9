import io

from knlightning.analysis.benchmark_plots import COLUMNS, draw_bars, draw_scaling
from knlightning.analysis.curves import COLOURS

ROWS = [
    {"setting": "layers", "variant": variant, "stride": 1, "resolution": resolution, "status": "ok"}
    | {key: 2.0 * resolution * unit for key, _, unit in COLUMNS}
    | {f"{key}_over_floor": 1.5 for key, _, _ in COLUMNS}
    for variant in ("floor", "kernel")
    for resolution in (32, 64)
]
LOST = {**dict.fromkeys(ROWS[0]), "setting": "layers", "variant": "kernel", "stride": 1, "resolution": 128}
LOST |= {"status": "out of memory"}


def test_a_bar_for_each_row_and_measure():
    figure = draw_bars([*ROWS, LOST])
    assert len(figure.axes) == len(COLUMNS)
    for axes in figure.axes:
        assert [bar.get_width() for bar in axes.patches] == [1.5] * 4 + [0.0]
        assert [text.get_text() for text in axes.texts] == ["1.50"] * 4 + ["out of memory"]


def test_a_panel_for_each_measure_and_stride_with_a_named_line_for_each_variant():
    # what has no place on a logarithmic axis
    nothing = LOST | {"variant": "floor", "status": "ok"} | {key: 0 for key, _, _ in COLUMNS}
    figure = draw_scaling([*ROWS, LOST, nothing])
    assert len(figure.axes) == len(COLUMNS)
    for axes in figure.axes:
        assert [text.get_text() for text in axes.texts] == ["floor", "kernel"]
        assert [text.get_color() for text in axes.texts] == [line.get_color() for line in axes.lines]
        low, high = (text.xy[1] for text in axes.texts)  # the lines end in the same point, their names do not
        assert axes.get_ylim()[0] < low < 0.9 * high < axes.get_ylim()[1]
        for line in axes.lines:
            assert [list(point) for point in line.get_xydata()] == [[32, 64], [64, 128]]
    figure.savefig(io.BytesIO())


def test_second_implementations_have_the_colour_of_their_normalization():
    rows = [row | {"variant": variant} for row, variant in zip(ROWS, ("floor", "kernel", "algorithm1"), strict=False)]
    bars = draw_bars(rows).axes[0].patches
    assert bars[2].get_hatch()
    assert bars[0].get_facecolor() != bars[1].get_facecolor() == bars[2].get_edgecolor()
    lines = draw_scaling(rows).axes[0].lines
    assert [line.get_linestyle() for line in lines] == ["-", "-", "--"]
    assert [line.get_color() for line in lines] == [COLOURS["none"], COLOURS["kernel"], COLOURS["kernel"]]
