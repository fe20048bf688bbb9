import sys

from experiments.draw_screens import capture, draw, halfway, lines_of

BAR = "import os; print(os.get_terminal_size().columns, *(f'\\rEpoch 7 {n}' for n in 'abc'), '\\n')"


def test_a_terminal_has_its_width():
    output = capture([sys.executable, "-c", BAR], 80)
    assert lines_of(output, 80) == ["Epoch 7 c", "", ""]
    assert output.startswith("80")
    assert lines_of(halfway(output), 80) == ["Epoch 7 b"]


def test_bars_below_bars_and_long_lines():
    output = "one\n" + "\rfirst" + "\n\rsecond\x1b[A" + "\n\r      \x1b[A" + "\rfirst done\n" + "\x1b[1mlast\x1b[0m"
    assert lines_of(output, 10) == ["one", "first done", "last"]
    assert lines_of("x" * 25, 10) == ["x" * 10, "x" * 10, "x" * 5]


def test_nothing_is_fetched_by_a_picture():
    svg = draw("some\ntext", 80)
    assert "some" in svg
    assert "cdnjs" not in svg
