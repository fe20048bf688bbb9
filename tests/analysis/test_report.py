import re

import pytest
from analysis.written_run import write_run

from knlightning.analysis.report import MOST_ROWS, write_page
from knlightning.analysis.run_results import read_run
from knlightning.pages import page


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "runs" / "tiny" / "3")


def test_page_holds_what_the_run_has_left(run):
    (run / "test" / "mistakes.html").write_text(page("a", "<h1>a</h1>\n<p>the mistakes</p>"))
    (run / "test" / "confusion.png").write_bytes(b"picture")
    html = write_page(read_run(run))
    for part in ("tiny/3", "87.50 %", "0.062", "480", "TinyNet", "best.ckpt of epoch 2", "40 images", "the mistakes"):
        assert part in html
    assert html.count("<img") == 2  # the curves and the confusion matrix
    assert not re.search(r'(src|href)="(?!data:)', html)  # nothing is fetched
    assert "&lt;class 0&gt;" in html
    assert "<class" not in html
    assert "Privacy" not in html


def test_page_of_a_run_without_results_says_how_to_get_them(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {class_path: a.B}\n")
    html = write_page(read_run(tmp_path))
    assert f"knl test --config {tmp_path}/config.yaml" in html
    assert "no metrics by epoch" in html


def test_of_many_classes_the_worst_are_listed(tmp_path):
    html = write_page(read_run(write_run(tmp_path, classes=MOST_ROWS + 2)))
    assert f"The {MOST_ROWS} of {MOST_ROWS + 2} classes" in html
    assert f"&lt;class {MOST_ROWS - 1}&gt;" in html
    assert f"&lt;class {MOST_ROWS}&gt;" not in html
