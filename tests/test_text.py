import pytest

from knlightning.text import cell, counted, printable


def test_what_a_terminal_would_obey_is_escaped():
    assert printable("\x1b[31mcat\x07\n\udce9\x9b.jpg") == r"\x1b[31mcat\x07\n\udce9\x9b.jpg"
    assert printable("é 1\x1b[2J\n\u202e\u2028") == r"é 1\x1b[2J\n\u202e\u2028"
    assert printable("Größe 猫 \U0001f408.jpg") == "Größe 猫 \U0001f408.jpg"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-a.jpg", "@SUM(A1)"])
def test_no_cell_is_a_formula(text):
    assert cell(text) == f"'{text}"


def test_one_thing_has_no_plural():
    assert [counted(number, "image") for number in (0, 1, 1200)] == ["0 images", "1 image", "1,200 images"]


def test_other_cells_stay():
    assert cell("pred/=1.jpg") == "pred/=1.jpg"
    assert cell("") == ""
