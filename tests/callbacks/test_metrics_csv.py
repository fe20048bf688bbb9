import csv

import pytest

from knlightning.callbacks import MetricsCSV


def rows(tmp_path):
    with (tmp_path / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_on_file_at_once_and_columns_grow(tmp_path):
    log = MetricsCSV(tmp_path)
    log.log_metrics({"a": 1.5}, 0)
    assert rows(tmp_path) == [{"step": "0", "a": "1.5"}]
    log.log_metrics({"b": 2}, 1)
    log.log_metrics({"a": 3, "b": 4}, 2)
    assert rows(tmp_path) == [
        {"step": "0", "a": "1.5", "b": ""},
        {"step": "1", "a": "", "b": "2"},
        {"step": "2", "a": "3", "b": "4"},
    ]


@pytest.mark.parametrize("first_step", [0, 2, 9])
def test_resumed_run_keeps_what_was_before_it(tmp_path, first_step):
    log = MetricsCSV(tmp_path)
    for step in range(4):
        log.log_metrics({"a": step}, step)
    resumed = MetricsCSV(tmp_path, first_step)
    resumed.log_metrics({"a": 7, "b": 8}, first_step)
    kept = [{"step": str(step), "a": str(step), "b": ""} for step in range(min(first_step, 4))]
    assert rows(tmp_path) == [*kept, {"step": str(first_step), "a": "7", "b": "8"}]


def test_row_cut_short_by_a_kill_is_dropped(tmp_path):
    log = MetricsCSV(tmp_path)
    log.log_metrics({"a": 1, "b": 2}, 0)
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text() + "1,3")
    MetricsCSV(tmp_path, 10).log_metrics({"a": 5, "b": 6}, 10)
    assert [row["step"] for row in rows(tmp_path)] == ["0", "10"]


def test_looking_at_the_log_changes_nothing(tmp_path):
    MetricsCSV(tmp_path).log_metrics({"a": 1}, 0)
    log = MetricsCSV(tmp_path)
    assert log.save_dir == str(tmp_path)
    log.finalize("success")
    assert rows(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfstep,a\n0,1\n",
        b"step;a\n0;1\n",
        b"0,1\n1,2\n",
        b"<<<<<<< HEAD\nstep,a\n0,1\n",
        b"step,a\n0,1\n=======\n1,2\n>>>>>>> other\n",
        b"step,a\n0,1,2,3\n",
        b"step,a\n\xff\xfe,1\n",
        b"step,a\n0,\x001\n",
        b"step,a,a\n0,1,2\n",
        b"step,a\nfirst,1\n",
        b'step,a\n"0,1\n',
        bytes(500),
    ],
)
def test_a_damaged_table_is_put_aside(tmp_path, content):
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.warns(UserWarning, match=r"metrics\.csv is damaged"):
        MetricsCSV(tmp_path, 5).log_metrics({"a": 1}, 5)
    assert rows(tmp_path) == [{"step": "5", "a": "1"}]
    (aside,) = tmp_path.glob("metrics.damaged-*.csv")
    assert aside.read_bytes() == content


def test_an_empty_table_is_continued(tmp_path):
    (tmp_path / "metrics.csv").touch()
    MetricsCSV(tmp_path, 5).log_metrics({"a": 1}, 5)
    assert rows(tmp_path) == [{"step": "5", "a": "1"}]


def test_a_planted_link_is_not_followed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("step\n")
    (tmp_path / "metrics.csv").symlink_to(secret)
    with pytest.warns(UserWarning, match=r"metrics\.csv is damaged, or not written"):
        MetricsCSV(tmp_path).log_metrics({"a": 1}, 0)
    assert secret.read_text() == "step\n"
    assert rows(tmp_path) == [{"step": "0", "a": "1"}]


def test_a_row_that_cannot_be_written_ends_no_run(tmp_path):
    (tmp_path / "file").touch()
    log = MetricsCSV(tmp_path / "file")
    with pytest.warns(UserWarning, match=r"Left out: rows of .*metrics\.csv \(FileExistsError.*The run goes on"):
        log.log_metrics({"a": 1}, 0)
    log.log_metrics({"a": 1}, 1)  # said once
    log.path = tmp_path / "metrics.csv"
    log.log_metrics({"a": 1}, 2)  # there again
    assert rows(tmp_path) == [{"step": "2", "a": "1"}]
