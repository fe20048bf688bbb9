from knlightning.analysis.benchmark_plots import COLUMNS, draw_bars, draw_scaling

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


def test_a_line_for_each_variant_and_stride():
    figure = draw_scaling([*ROWS, LOST])
    for axes in figure.axes[: len(COLUMNS)]:
        assert [line.get_label() for line in axes.lines] == ["floor, stride 1", "kernel, stride 1"]
        for line in axes.lines:
            assert [list(point) for point in line.get_xydata()] == [[32, 64], [64, 128]]
