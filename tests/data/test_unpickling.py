import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from standins import Malicious

from knlightning.data.unpickling import load_pickle

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
)
# what numpy pickles into is the module's business, not the file's: one file for all examples is fine
same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)


@same_folder
@given(plain, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_data_come_back(tmp_path, value, protocol):
    path = tmp_path / "plain"
    path.write_bytes(pickle.dumps(value, protocol))
    assert load_pickle(path) == value


@same_folder
@given(
    st.sampled_from(["?", "u1", "<i8", ">i4", "<f4", ">f8"]),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(0, pickle.HIGHEST_PROTOCOL),
    st.booleans(),
)
def test_arrays_come_back(tmp_path, dtype, shape, protocol, fortran):
    array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype, order="F" if fortran else "C")
    path = tmp_path / "array"
    path.write_bytes(pickle.dumps({"data": array}, protocol))
    loaded = load_pickle(path)["data"]
    assert loaded.dtype == array.dtype.newbyteorder("=")  # numpy itself swaps bytes on reading
    np.testing.assert_array_equal(loaded, array)


def test_both_of_numpys_module_names(tmp_path):
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for module in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        content = pickle.dumps(array, 2)
        for written in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
            content = content.replace(b"c" + written + b"\n", b"c" + module + b"\n")
        path = tmp_path / "array"
        path.write_bytes(content)
        np.testing.assert_array_equal(load_pickle(path), array)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_is_not_run(tmp_path, protocol):
    path, trace = tmp_path / "evil", tmp_path / "was_run"
    path.write_bytes(pickle.dumps({"data": Malicious(os.mkdir, str(trace))}, protocol))
    with pytest.raises(ValueError, match=r"evil.*posix\.mkdir is not allowed"):
        load_pickle(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes())  # the file does what it is meant to do
    assert trace.exists()


@pytest.mark.parametrize(
    "value",
    [
        Malicious(eval, "1"),
        Malicious(getattr, "", "join"),
        Malicious(np.load, "x"),
        np.array([{}], dtype=object),
        np.zeros(2, dtype=[("a", "u1")]),
        Path("x"),
        np.dtype,
    ],
)
def test_everything_else_is_refused(tmp_path, value):
    path = tmp_path / "other"
    path.write_bytes(pickle.dumps(value, 2))
    if value is np.dtype:  # only the stand-in, which can do nothing
        assert load_pickle(path) is not np.dtype
        return
    with pytest.raises(ValueError, match="other: no pickle of plain data"):
        load_pickle(path)


def test_flags_that_would_turn_numbers_into_objects_have_no_effect(tmp_path):
    content = pickle.dumps(np.arange(8, dtype="<i8"), 2)
    state_end = b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"  # item size, alignment, flags of the dtype
    assert content.count(state_end) == 1
    path = tmp_path / "flags"
    path.write_bytes(content.replace(state_end, state_end.replace(b"K\x00t", b"K\x3ft")))
    loaded = load_pickle(path)
    assert not loaded.dtype.hasobject
    np.testing.assert_array_equal(loaded, np.arange(8))


@same_folder
@given(st.integers(0, 400), st.integers(0, 255))
def test_damage_gives_data_or_a_named_error(tmp_path, place, byte):
    content = bytearray(pickle.dumps({"data": np.arange(8, dtype=np.uint8), "labels": [1, 2, 3]}, 2))
    content[place % len(content)] = byte
    path = tmp_path / "bits"
    path.write_bytes(content)
    message = str(path)
    try:
        load_pickle(path)
    except ValueError as error:
        message = str(error)
    assert str(path) in message


def test_truncation_at_every_byte(tmp_path):
    content = pickle.dumps({"data": np.arange(8, dtype=np.uint8), "labels": [1, 2, 3]}, 2)
    path = tmp_path / "cut"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="cut: no pickle of plain data"):
            load_pickle(path)


def test_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_pickle(tmp_path / "nothing")


def test_arrays_that_may_not_be_written_to_come_back(tmp_path):
    array = np.frombuffer(b"abcdef", np.uint8).reshape(2, 3)
    path = tmp_path / "array"
    path.write_bytes(pickle.dumps(array, 5))
    np.testing.assert_array_equal(load_pickle(path), array)


def test_a_buffer_is_no_way_to_other_types(tmp_path):
    content = pickle.dumps(np.arange(3, dtype=np.uint8), 5)
    path = tmp_path / "array"
    path.write_bytes(content.replace(b"\x8c\x02u1", b"\x8c\x02O8"))
    with pytest.raises(ValueError, match="dtype 'O8' is not allowed"):
        load_pickle(path)
